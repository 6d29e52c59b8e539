"""What data sets of every kind share: classes, and what is said of those that cannot be used as they are."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass

from detectron2.utils.file_io import PathManager

from piip_core.errors import UserError

__all__ = [
    "Category",
    "DatasetError",
    "Findings",
    "check_num_classes",
    "check_same_classes",
    "existing_folder",
    "first_few",
]

_SHOWN = 3  # entries named per complaint; the rest is counted


class DatasetError(UserError):
    """A data set that cannot be used as it is; the message names the file, the entry and what was expected."""


@dataclass(frozen=True)
class Category:
    """One class of a data set: its id in the annotations and its name."""

    id: int
    name: str


def existing_folder(folder: str | None, expected: str, settings: str = "images") -> str:
    """The local path of a folder.

    Raises:
        DatasetError: If there is none; the message says what was `expected`, and which `settings` name it.
    """
    local = PathManager.get_local_path(folder) if folder else ""
    if not os.path.isdir(local):
        kind = "is a file" if os.path.isfile(local) else "no such folder"
        raise DatasetError(
            f"{folder}: {kind} (looked from {os.getcwd()}): expected {expected}. Set data.train.{settings} and "
            f"data.test.{settings}, or DETECTRON2_DATASETS for the standard layout"
        )
    return local


def check_num_classes(found: int, what: str, num_classes: int | None) -> None:
    """Compares the number of classes of a data set with that of a configuration, if there is one.

    Raises:
        DatasetError: If it is another.
    """
    if num_classes not in (None, found):
        raise DatasetError(
            f"{what}, but the configuration says data.num_classes={num_classes}. Set data.num_classes={found} "
            "(tools/lazyconfig_train_net.py of this project does so by itself)"
        )


def check_same_classes(path: str, classes: Sequence[Category], other: str, others: Sequence[Category]) -> None:
    """Compares the classes of two data sets.

    Raises:
        DatasetError: If they are different; the message says which.
    """
    if tuple(classes) == tuple(others):
        return
    ours, theirs = ([category.name for category in each] for each in (classes, others))
    if set(ours) == set(theirs):
        ours, theirs = ([f"{category.name} (id {category.id})" for category in each] for each in (classes, others))
    missing = first_few([name for name in ours if name not in theirs]) or "none"
    more = first_few([name for name in theirs if name not in ours]) or "none"
    raise DatasetError(
        f"{other} and {path} have different categories: only the first has {more}, only the second has {missing}: "
        "expected the same in both"
    )


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
