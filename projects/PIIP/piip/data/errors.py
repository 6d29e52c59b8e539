"""What is said about a data set that cannot be used, whatever the task."""

from __future__ import annotations

from collections.abc import Sequence

from piip_core.errors import UserError

__all__ = ["DatasetError", "first_few"]

_SHOWN = 3  # entries named per complaint; the rest is counted


class DatasetError(UserError):
    """A data set that cannot be used as it is; the message names the file, the entry and what was expected."""


def first_few(found: Sequence[str]) -> str:
    """The first entries of a complaint, and how many more there are."""
    more = len(found) - _SHOWN
    return ", ".join(found[:_SHOWN]) + (f" and {more} more" if more > 0 else "")
