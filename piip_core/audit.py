"""What reading all files of data sets has found: a table with examples for people, everything as JSON."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from tabulate import tabulate

from .files import write_atomically


@dataclass(frozen=True)
class Finding:
    """Something wrong with a file or folder, or with one entry of a file."""

    kind: str
    path: str
    message: str
    entry: int | None = None  # its index


@dataclass
class SetAudit:
    """What was found in one set, such as a file of annotations or a folder of images.

    Attributes:
        title: Name of the set.
        expected: Number of images or entries that it should have, if known.
        found: Number of those that it has.
        columns: More of its row in the table, by header.
        problems: Everything that is wrong.
        warning: What is odd without being wrong.
    """

    title: str
    expected: int | None = None
    found: int = 0
    columns: dict[str, Any] = field(default_factory=dict)
    problems: list[Finding] = field(default_factory=list)
    warning: str = ""

    def add(self, kind: str, path: str | os.PathLike[str], message: str, entry: int | None = None) -> None:
        """Adds a problem."""
        self.problems.append(Finding(kind, str(path), message, entry))

    def compare(self, what: str, path: str | os.PathLike[str], found: int, expected: int | None) -> None:
        """Adds a problem if a number is not the one that is expected; None expects nothing."""
        if expected not in (None, found):
            self.add(f"number of {what}", path, f"{path}: {found} {what}: expected {expected}")


@dataclass
class Audit:
    """What was found in all sets."""

    sets: Sequence[SetAudit]
    note: str = ""  # how they were read

    @property
    def ok(self) -> bool:
        """Whether nothing is wrong."""
        return not any(part.problems for part in self.sets)

    def verdict(self) -> str:
        """One sentence, and the note."""
        if not self.ok:
            text = "Something is wrong, see above."
        elif any(part.warning for part in self.sets):
            text = "No file is wrong, but see the warning above."
        else:
            text = "Everything is in order."
        return f"{text} {self.note}".strip()

    def summary(self, examples: int = 3) -> str:
        """A table of the sets, and of every kind of problem the first examples."""
        rows = []
        for part in self.sets:
            row = {"set": part.title, "found": part.found, "expected": part.expected, **part.columns}
            rows.append(row | {"problems": len(part.problems)})
        lines = [tabulate(rows, "keys", "github")]
        for part in self.sets:
            for kind, count in Counter(problem.kind for problem in part.problems).items():
                lines.append(f"\nPROBLEM in {part.title}: {kind}: {count}")
                lines += [f"  {problem.message}" for problem in part.problems if problem.kind == kind][:examples]
            if part.warning:
                lines.append(f"\nWARNING for {part.title}: {part.warning}")
        return "\n".join(lines)

    def write_json(self, path: str | os.PathLike[str]) -> None:
        """Writes everything found; an interruption leaves the old file."""
        with write_atomically(path, "w") as file:
            json.dump({"ok": self.ok, **asdict(self)}, file, indent=1)
