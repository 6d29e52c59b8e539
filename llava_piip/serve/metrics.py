"""What Prometheus reads."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import Metric
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector

__all__ = ["Metrics", "merge_metrics"]

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

    async def text(self) -> bytes:
        """All of them in Prometheus' format."""
        return generate_latest(self._registry)


def merge_metrics(texts: Mapping[str, str]) -> bytes:
    """Metrics of several replicas, told apart by the label `replica`.

    Args:
        texts: Those of each in Prometheus' format, by the replica's name.

    Returns:
        All of them in Prometheus' format.
    """
    families: dict[str, Metric] = {}
    for replica, text in sorted(texts.items()):
        for family in text_string_to_metric_families(text):
            merged = families.setdefault(family.name, Metric(family.name, family.documentation, family.type))
            for sample in family.samples:
                merged.add_sample(sample.name, {**sample.labels, "replica": replica}, sample.value)
    registry = CollectorRegistry()
    registry.register(_Collected(families.values()))
    return generate_latest(registry)


class _Collected(Collector):
    """Gives what was collected elsewhere."""

    def __init__(self, families: Iterable[Metric]) -> None:
        self._families = list(families)

    def collect(self) -> Iterable[Metric]:
        return self._families
