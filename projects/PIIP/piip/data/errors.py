"""What is said about a data set that cannot be used as it is, whatever the task."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from piip_core.errors import UserError

__all__ = ["DatasetError", "Findings", "first_few"]

_SHOWN = 3  # entries named per complaint; the rest is counted


class DatasetError(UserError):
    """A data set that cannot be used as it is; the message names the file, the entry and what was expected."""


def first_few(found: Sequence[str]) -> str:
    """The first entries of a complaint, and how many more there are."""
    more = len(found) - _SHOWN
    return ", ".join(found[:_SHOWN]) + (f" and {more} more" if more > 0 else "")


class Findings:
    """What was found in one file, by kind: what it cannot be used with, and what was mended or left out."""

    def __init__(self, path: str) -> None:
        self.path = path
        self._errors: dict[str, list[str]] = {}
        self._notes: dict[str, list[str]] = {}

    def error(self, kind: str, entry: str) -> None:
        """Adds an entry that cannot be used; `kind` says why and what was expected."""
        self._errors.setdefault(kind, []).append(entry)

    def note(self, kind: str, entry: str) -> None:
        """Adds an entry that was mended or left out; `kind` follows on a number."""
        self._notes.setdefault(kind, []).append(entry)

    def raise_errors(self) -> None:
        """Raises all errors as one.

        Raises:
            DatasetError: If there is one.
        """
        if self._errors:
            problems = (f"{len(found)} x {kind}: {first_few(found)}" for kind, found in self._errors.items())
            raise DatasetError(f"{self.path}: {'; '.join(problems)}. Correct these entries or remove them")

    def log_notes(self, logger: logging.Logger) -> None:
        """Logs all notes as one warning."""
        if self._notes:
            notes = (f"{len(found)} {kind}: {first_few(found)}" for kind, found in self._notes.items())
            logger.warning("%s: %s", self.path, "; ".join(notes))
