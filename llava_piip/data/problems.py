"""What can be wrong with samples and their files, and counts of it that survive worker processes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from enum import Enum
from pathlib import Path

import torch
from torch.utils.data import get_worker_info

from piip_core.errors import UserError

__all__ = ["DataError", "Problem", "SharedCounts", "reading"]

_MAX_WORKERS = 128


class Problem(Enum):
    """Kinds of unusable samples; the value is the name in reports."""

    MISSING = "image missing"
    OUTSIDE = "image outside of its folder"
    EMPTY = "image file empty"
    UNREADABLE = "image file unreadable"
    BROKEN = "image broken"
    TOO_LARGE = "image too large"
    UNUSABLE = "image of an unusable kind"
    PLACEHOLDERS = "placeholders do not match the images"
    CONVERSATION = "conversation unusable"
    RECORD = "entry malformed"


class DataError(UserError):
    """Training data that cannot be used; the message names the file, the entry and the fix.

    Attributes:
        problem: The kind, by which skipped samples are counted.
    """

    def __init__(self, message: str, problem: Problem = Problem.RECORD) -> None:
        super().__init__(message)  # the message alone: DataLoader builds the error anew from it in the main process
        self.problem = problem


@contextmanager
def reading(path: Path, error_type: type[UserError], advice: str = "give the path of a file") -> Iterator[None]:
    """Turns what makes a text file unreadable into an error that names it."""
    try:
        yield
    except FileNotFoundError:
        raise error_type(f"{path}: no such file; {advice}") from None
    except UnicodeDecodeError as error:
        where = f"{error.reason} at byte {error.start}"
        raise error_type(f"{path}: not UTF-8 text ({where}); convert it or load it again") from None
    except OSError as error:
        raise error_type(f"{path}: cannot be read ({error.strerror})") from error


class SharedCounts:
    """Counts by name that the workers of a `DataLoader` add to and the process that owns them reads.

    They lie in shared memory, a row for every worker and one for the process itself, so that nobody writes where
    another one does. Copies made by pickling to disk or to another machine are separate.
    """

    def __init__(self, names: Iterable[str]) -> None:
        self._names = tuple(names)
        self._rows = torch.zeros(_MAX_WORKERS + 1, len(self._names), dtype=torch.int64).share_memory_()

    def add(self, name: str, number: int = 1) -> int:
        """Adds to one count and returns what this worker or process has counted of it."""
        worker = get_worker_info()
        row = 0 if worker is None else 1 + worker.id % _MAX_WORKERS
        count = self._rows[row, self._names.index(name)]
        count += number
        return int(count)

    def __getitem__(self, name: str) -> int:
        """The sum over the process and its workers."""
        return int(self._rows[:, self._names.index(name)].sum())
