"""What an audit of conversation files found; see `llava_piip.data.audit`."""

from __future__ import annotations

import json
import os
from collections import Counter
from dataclasses import asdict, dataclass, field

from tabulate import tabulate

from piip_core.files import write_atomically

from .problems import Problem

__all__ = ["AuditReport", "Count", "FileSummary", "Finding"]

UNUSABLE_FILE = "file unusable"
EMPTY_ANSWER = "answer empty or missing"
REPEATED_ID = "id occurs before"
OTHER_FORMAT = "format differs from the name"
# Neither hurts: images are read by their content, and ids only name entries
_INFORMATION = (REPEATED_ID, OTHER_FORMAT)
_ORDER = (UNUSABLE_FILE, *(problem.value for problem in Problem), EMPTY_ANSWER, *_INFORMATION)


@dataclass(frozen=True)
class Finding:
    """Something about an entry of a conversation file."""

    file: str
    entry: int | None  # its index; None for what concerns the file
    id: str | None  # if it could be read
    kind: str  # a value of `Problem`, or one of this module's names
    image: str | None  # if it is about one
    message: str  # what was found, with the fix

    @property
    def is_problem(self) -> bool:
        """Whether training would stop at the entry or skip it, wholly or in part; otherwise it is information."""
        return self.kind not in _INFORMATION


@dataclass(frozen=True)
class Count:
    """A number beside the published one."""

    what: str
    found: int
    published: int


@dataclass
class FileSummary:
    """Numbers of one conversation file."""

    file: str
    image_root: str
    entries: int = 0  # malformed ones too
    with_image: int = 0
    text_only: int = 0
    entries_by_folder: Counter[str] = field(default_factory=Counter)  # of their first image
    images_by_folder: Counter[str] = field(default_factory=Counter)  # each image once
    unusable_by_folder: Counter[str] = field(default_factory=Counter)  # of these, or missing
    counts: list[Count] = field(default_factory=list)  # beside the published ones


@dataclass
class AuditReport:
    """The result of an audit."""

    decode: str  # how images were read
    files: list[FileSummary] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)  # in the order of files and entries

    @property
    def problems(self) -> list[Finding]:
        """The findings that are more than information."""
        return [finding for finding in self.findings if finding.is_problem]

    @property
    def other_counts(self) -> list[Count]:
        """The numbers that are not the published ones."""
        return [count for summary in self.files for count in summary.counts if count.found != count.published]

    @property
    def ok(self) -> bool:
        """Whether there are no problems and every count is the published one."""
        return not self.problems and not self.other_counts

    @property
    def totals(self) -> dict[str, int]:
        """Number of findings by kind."""
        totals = Counter(finding.kind for finding in self.findings)
        return {kind: totals[kind] for kind in _ORDER if totals[kind]}

    def write_json(self, path: str | os.PathLike[str]) -> None:
        """Writes everything as JSON; an interruption leaves the old file."""
        content = {
            "ok": self.ok,
            "decode": self.decode,
            "files": [vars(summary) | {"counts": list(map(asdict, summary.counts))} for summary in self.files],
            "totals": self.totals,
            "findings": [asdict(finding) | {"problem": finding.is_problem} for finding in self.findings],
        }
        with write_atomically(path, "w") as file:
            json.dump(content, file, indent=1)
            file.write("\n")

    def summary(self, *, examples: int = 3, max_folders: int = 20) -> str:
        """Tables for people, with so many findings of each kind and so many image folders of each file."""
        files = [(s.file, s.entries, s.with_image, s.text_only, s.image_root) for s in self.files]
        parts = [tabulate(files, ["file", "entries", "with image", "text only", "image folder"], "github")]
        parts += [_folder_table(summary, max_folders) for summary in self.files]
        counts = [
            (count.what, count.found, count.published, "as published" if count.found == count.published else "DIFFERS")
            for summary in self.files
            for count in summary.counts
        ]
        if counts:
            parts.append(tabulate(counts, ["entries", "found", "published size", ""], "github"))
        lines = []
        for kind, number in self.totals.items():
            lines.append(f"{'information' if kind in _INFORMATION else 'PROBLEM'}: {kind}: {number}")
            found = [finding.message for finding in self.findings if finding.kind == kind]
            lines += [f"  {message}" for message in found[:examples]]
            if number > examples:
                lines.append(f"  and {number - examples} more")
        return "\n\n".join(filter(None, [*parts, "\n".join(lines)]))

    def verdict(self) -> str:
        """One line."""
        reading = {
            "none": "the images were not read, only looked up",
            "header": "of the images only the headers were read: decode=full finds truncated ones too",
            "full": "all images were decoded",
        }[self.decode]
        if self.ok:
            return f"Everything is in order ({reading})."
        files = len({finding.file for finding in self.problems if finding.entry is None})
        bad = len({(f.file, f.entry) for f in self.problems if f.entry is not None})
        other = len(self.other_counts)
        found = [
            f"unusable files: {files}" if files else "",
            f"entries with problems: {bad} of {sum(summary.entries for summary in self.files)}" if bad else "",
            f"counts that differ from the published ones: {other}" if other else "",
        ]
        return f"{'; '.join(filter(None, found))} ({reading})."


def _folder_table(summary: FileSummary, max_folders: int) -> str:
    shown = dict(summary.images_by_folder.most_common(max_folders))
    numbers = (summary.entries_by_folder, summary.images_by_folder, summary.unusable_by_folder)
    rows = [(folder, *(by_folder[folder] for by_folder in numbers)) for folder in sorted(shown)]
    if left := [folder for folder in summary.images_by_folder if folder not in shown]:
        sums = (sum(by_folder[folder] for folder in left) for by_folder in numbers)
        rows.append((f"{len(left)} more folders", *sums))
    return tabulate(rows, ["images in", "entries", "images", "missing or unusable"], "github") if rows else ""
