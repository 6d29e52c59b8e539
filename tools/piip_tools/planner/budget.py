"""Budgets as written on a command line."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from piip_core.errors import ConfigError

__all__ = ["Budget", "parse_budget", "parse_count"]

Kind = Literal["flops", "memory", "latency"]

_COUNTS = {"": 1.0, "K": 1e3, "M": 1e6, "G": 1e9, "T": 1e12}
_UNITS: dict[str, tuple[Kind, float]] = {
    "G": ("flops", 1e9),
    "T": ("flops", 1e12),
    "MB": ("memory", 1e6),
    "GB": ("memory", 1e9),
    "MiB": ("memory", 2.0**20),
    "GiB": ("memory", 2.0**30),
    "ms": ("latency", 1e-3),
    "s": ("latency", 1.0),
}


@dataclass(frozen=True)
class Budget:
    """What a model may cost: multiply-accumulates by the published count, or for one image bytes or seconds."""

    kind: Kind
    limit: float

    def text(self, value: float | None = None) -> str:
        """The limit, or a value of the same kind, with its unit."""
        value = self.limit if value is None else value
        if self.kind == "flops":
            return f"{value / 1e9:.0f}G"
        if self.kind == "memory":
            return f"{value / 1e9:.2f}GB"
        return f"{value * 1e3:.0f}ms" if value < 10 else f"{value:.1f}s"


def parse_budget(text: str) -> Budget:
    """Reads a budget such as 450G, 1.5T (multiply-accumulates), 12GB, 11.5GiB, 800ms or 2s.

    Raises:
        ConfigError: For anything else.
    """
    value, unit = _split(text)
    if unit not in _UNITS or not value:
        raise ConfigError(
            f"budget {text!r}: expected a positive number with a unit: 450G or 1.5T (FLOPs), 12GB or 800MB (memory), "
            "800ms or 2s (latency)"
        )
    kind, scale = _UNITS[unit]
    return Budget(kind, value * scale)


def parse_count(text: str) -> int:
    """Reads a number of parameters such as 200M or 1.2G.

    Raises:
        ConfigError: For anything else.
    """
    value, unit = _split(text)
    if not value or unit not in _COUNTS:
        raise ConfigError(f"{text!r}: expected a positive number of parameters such as 200M")
    return round(value * _COUNTS[unit])


def _split(text: str) -> tuple[float, str]:
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)", text.strip())
    return (float(found[1]), found[2]) if found else (0.0, "")
