"""What Prometheus reads."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

__all__ = ["Metrics"]

_SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)


class Metrics:
    """Counts and times of one server, in a registry of its own."""

    def __init__(self) -> None:
        registry = self._registry = CollectorRegistry()
        self.requests = Counter(
            "piip_requests",
            "Chat completions by outcome: a status of HTTP, or cancelled",
            ["outcome"],
            registry=registry,
        )
        self.active = Gauge("piip_requests_active", "Chat completions that run or wait", registry=registry)
        self.images = Counter("piip_images", "Pictures of accepted requests", registry=registry)
        self.prompt_tokens = Counter("piip_prompt_tokens", "Tokens of prompts, visual ones included", registry=registry)
        self.answer_tokens = Counter("piip_answer_tokens", "Tokens generated", registry=registry)
        self.first_piece = Histogram(
            "piip_first_text_seconds", "From the request to its first text", registry=registry, buckets=_SECONDS
        )
        self.duration = Histogram(
            "piip_request_seconds", "From the request to the end of its answer", registry=registry, buckets=_SECONDS
        )

    def text(self) -> bytes:
        """All of them in Prometheus' format."""
        return generate_latest(self._registry)
