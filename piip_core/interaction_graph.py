"""Which branches exchange features: the notation of interaction units and the graphs of the paper's Table XVII."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import ClassVar

from .validation import check

__all__ = ["UnitSpec", "graph_presets"]


@dataclass(frozen=True)
class UnitSpec:
    """One interaction unit between branches `low` < `high` (numbers from 1): which of the two receive features."""

    low: int
    high: int
    into_low: bool = True
    into_high: bool = True

    _PATTERN: ClassVar[re.Pattern[str]] = re.compile(r"(\d+)\s*(<->|->|<-)\s*(\d+)")

    @classmethod
    def parse(cls, text: str) -> UnitSpec:
        """Reads `"2<->3"` (both directions), `"3->2"` (features of Branch 3 into Branch 2) or `"2<-3"` (the same)."""
        match = cls._PATTERN.fullmatch(text.strip()) if isinstance(text, str) else None
        check(match is not None, "InteractionConfig.units", text, "a unit such as '2<->3' or '3->2'")
        a, arrow, b = int(match[1]), match[2], int(match[3])
        check(a != b, "InteractionConfig.units", text, "two different branches")
        into_b, into_a = arrow != "<-", arrow != "->"
        return cls(a, b, into_a, into_b) if a < b else cls(b, a, into_b, into_a)


def _adjacent(n: int) -> list[tuple[int, int]]:
    return [(i, i + 1) for i in range(n - 1, 0, -1)]  # from the high-resolution end, as published


def graph_presets(n: int) -> dict[str, tuple[tuple[str, ...], ...]]:
    """Interaction graphs of the paper's Table XVII, each a cycle over consecutive interactions."""
    down = tuple(f"{b}->{a}" for a, b in _adjacent(n))
    up = tuple(f"{a}->{b}" for a, b in reversed(_adjacent(n)))
    both = tuple(f"{a}<->{b}" for a, b in _adjacent(n))
    closing = n > 2
    return {
        "adjacent": (both,),
        "alternating": (down, up),
        "cycle_down": (down + ((f"1->{n}",) if closing else ()),),
        "cycle_up": (up + ((f"{n}->1",) if closing else ()),),
        "bidirectional_cycle": (both + ((f"1<->{n}",) if closing else ()),),
    }
