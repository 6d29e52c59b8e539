"""The classes of a data set, whatever the task."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Category"]


@dataclass(frozen=True)
class Category:
    """One class of a data set: its id in the annotations and its name."""

    id: int
    name: str
