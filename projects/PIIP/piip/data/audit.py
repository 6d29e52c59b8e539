"""What the audits of data sets have in common: reading many files at a time, and telling what is wrong."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, TypeVar

from tabulate import tabulate
from tqdm import tqdm

from piip_core.files import write_atomically

__all__ = ["Audit", "Problem", "SetAudit", "read_all"]

Problem = tuple[str, str, str]
"""Kind, path and message."""

_AHEAD = 10_000  # files queued at a time: each that waits takes a kilobyte

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")


@dataclass
class SetAudit:
    """What was found in one set.

    Attributes:
        title: Name of the set.
        expected: Number of images that it should have, if known.
        images: Number of its images.
        columns: More of its row in the table, by header.
        details: What its entry in the report holds besides.
        problems: Everything that is wrong.
        warning: What is odd without being wrong.
    """

    title: str
    expected: int | None = None
    images: int = 0
    columns: dict[str, Any] = field(default_factory=dict)
    details: dict[str, Any] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)
    warning: str = ""


@dataclass
class Audit:
    """What was found in all sets."""

    sets: Sequence[SetAudit]

    @property
    def ok(self) -> bool:
        """Whether nothing is wrong."""
        return not any(part.problems for part in self.sets)

    def verdict(self) -> str:
        """One sentence."""
        if not self.ok:
            return "Something is wrong, see above."
        warned = any(part.warning for part in self.sets)
        return "No file is wrong, but see the warning above." if warned else "Everything is in order."

    def summary(self, examples: int = 3) -> str:
        """A table of the sets, and of every kind of problem the first examples."""
        rows = []
        for part in self.sets:
            row = {"set": part.title, "images": part.images, "expected": part.expected, **part.columns}
            rows.append(row | {"problems": len(part.problems)})
        lines = [tabulate(rows, "keys", "github")]
        for part in self.sets:
            for kind, count in Counter(kind for kind, _, _ in part.problems).items():
                lines.append(f"\nPROBLEM in {part.title}: {kind}: {count}")
                lines += [f"  {message}" for other, _, message in part.problems if other == kind][:examples]
            if part.warning:
                lines.append(f"\nWARNING for {part.title}: {part.warning}")
        return "\n".join(lines)

    def write_json(self, path: str | os.PathLike[str]) -> None:
        """Writes everything found."""
        content = []
        for part in self.sets:
            problems = [dict(zip(("kind", "path", "message"), problem, strict=True)) for problem in part.problems]
            entry = {"title": part.title, "expected": part.expected, **part.details, "problems": problems}
            content.append(entry | {"warning": part.warning})
        with write_atomically(path, "w") as file:
            json.dump({"sets": content}, file, indent=1)


def read_all(
    check: Callable[[_Item], _Result], items: Sequence[_Item], *, title: str, workers: int | None
) -> Iterator[_Result]:
    """Checks files in so many threads (None: one per core), and gives the results in order, with a progress bar."""
    bar = tqdm(total=len(items), desc=f"Reading {title}", unit="image", disable=None)
    with ThreadPoolExecutor(workers or os.cpu_count()) as readers, bar:
        for start in range(0, len(items), _AHEAD):
            for result in readers.map(check, items[start : start + _AHEAD]):
                bar.update()
                yield result
