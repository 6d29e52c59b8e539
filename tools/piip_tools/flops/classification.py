"""Both counts of published classifiers: by the published rule, and as executed."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from piip_core import zoo

from .published import Count, published_count
from .report import analyze_backbone

__all__ = ["ClassificationRow", "analyze_classifiers"]


@dataclass(frozen=True, kw_only=True)
class ClassificationRow:
    """One published classifier: our counts of it for one image.

    Attributes:
        entry: The model with its printed numbers.
        published_count: By the published rule.
        executed: As our modules hold and run it.
    """

    entry: zoo.ClassificationEntry
    published_count: Count
    executed: Count


def analyze_classifiers(entries: Iterable[zoo.ClassificationEntry] | None = None) -> Iterator[ClassificationRow]:
    """Counts published classifiers one after the other; without `entries` all of them."""
    for entry in zoo.classification_entries() if entries is None else entries:
        counted = analyze_backbone(entry.config)
        yield ClassificationRow(
            entry=entry,
            published_count=published_count(entry.config).total,
            executed=Count(counted.params, counted.flops),
        )
