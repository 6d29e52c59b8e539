"""What an audit of conversation files found; see `llava_piip.data.audit`."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field

from tabulate import tabulate

from piip_core.files import write_atomically

from .problems import Problem

__all__ = [
    "EMPTY_ANSWER",
    "OTHER_FORMAT",
    "REPEATED_ID",
    "UNUSABLE_FILE",
    "AuditReport",
    "Count",
    "FileSummary",
    "Finding",
]

UNUSABLE_FILE = "file unusable"
EMPTY_ANSWER = "answer empty or missing"
REPEATED_ID = "id occurs before"
OTHER_FORMAT = "format differs from the name"
# Neither hurts: images are read by their content, and ids only name entries
_INFORMATION = (REPEATED_ID, OTHER_FORMAT)
_ORDER = (UNUSABLE_FILE, *(problem.value for problem in Problem), EMPTY_ANSWER, *_INFORMATION)


@dataclass(frozen=True)
class Finding:
    """Something about an entry.

    Attributes:
        file: The conversation file.
        entry: Number of the entry, from 0; None for what concerns the file.
        id: The entry's id, if it could be read.
        kind: A value of `Problem`, or one of this module's names.
        image: The image, if it is about one.
        message: What was found, with the fix.
    """

    file: str
    entry: int | None
    id: str | None
    kind: str
    image: str | None
    message: str

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
    """Numbers of one conversation file.

    Attributes:
        file: The file.
        image_root: Folder that its image names are relative to.
        entries: Number of entries, malformed ones too.
        with_image: Number of entries with an image.
        text_only: Number of entries without one.
        entries_by_folder: Number of entries by the folder of their first image.
        images_by_folder: Number of different images by folder.
        unusable_by_folder: How many of these are missing or unusable.
        counts: Comparison with the published sizes, if there are any.
    """

    file: str
    image_root: str
    entries: int = 0
    with_image: int = 0
    text_only: int = 0
    entries_by_folder: Counter[str] = field(default_factory=Counter)
    images_by_folder: Counter[str] = field(default_factory=Counter)
    unusable_by_folder: Counter[str] = field(default_factory=Counter)
    counts: list[Count] = field(default_factory=list)


@dataclass
class AuditReport:
    """The result of an audit.

    Attributes:
        decode: How images were read: "none", "header" or "full".
        files: Numbers per conversation file.
        findings: Everything found, in the order of files and entries.
    """

    decode: str
    files: list[FileSummary] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)

    @property
    def problems(self) -> list[Finding]:
        """The findings that are more than information."""
        return [finding for finding in self.findings if finding.is_problem]

    @property
    def ok(self) -> bool:
        """Whether there are no problems and every count is the published one."""
        return not any(finding.is_problem for finding in self.findings) and not any(self._other_counts())

    def bad_entries(self, file: str | os.PathLike[str]) -> set[int]:
        """Numbers of the entries of a file that have a problem."""
        return {f.entry for f in self.findings if f.file == str(file) and f.is_problem and f.entry is not None}

    def write_json(self, path: str | os.PathLike[str]) -> None:
        """Writes everything as JSON; an interruption leaves the old file."""
        content = {
            "ok": self.ok,
            "decode": self.decode,
            "files": [vars(summary) | {"counts": list(map(asdict, summary.counts))} for summary in self.files],
            "totals": dict(self._totals()),
            "findings": [asdict(finding) | {"problem": finding.is_problem} for finding in self.findings],
        }
        with write_atomically(path, "w") as file:
            json.dump(content, file, indent=1)
            file.write("\n")

    def summary(self, *, examples: int = 3, max_folders: int = 20) -> str:
        """Tables for people.

        Args:
            examples: How many findings of each kind are shown.
            max_folders: How many image folders of a file are shown.
        """
        parts = [self._file_table(), *(self._folder_table(summary, max_folders) for summary in self.files)]
        if any(summary.counts for summary in self.files):
            parts.append(self._count_table())
        parts.append(self._finding_table(examples))
        return "\n\n".join(part for part in parts if part)

    def verdict(self) -> str:
        """One line."""
        bad = len({(f.file, f.entry) for f in self.problems if f.entry is not None})
        reading = {
            "none": "the images were not read, only looked up",
            "header": "of the images only the headers were read: decode=full finds truncated ones too",
            "full": "all images were decoded",
        }[self.decode]
        if self.ok:
            return f"Everything is in order ({reading})."
        files = len({finding.file for finding in self.problems if finding.entry is None})
        other = sum(1 for _ in self._other_counts())
        found = [
            f"unusable files: {files}" if files else "",
            f"entries with problems: {bad} of {sum(summary.entries for summary in self.files)}" if bad else "",
            f"counts that differ from the published ones: {other}" if other else "",
        ]
        return f"{'; '.join(filter(None, found))} ({reading})."

    def _totals(self) -> Counter[str]:
        totals = Counter(finding.kind for finding in self.findings)
        return Counter({kind: totals[kind] for kind in _ORDER if totals[kind]})

    def _other_counts(self) -> Iterator[Count]:
        return (count for summary in self.files for count in summary.counts if count.found != count.published)

    def _file_table(self) -> str:
        rows = [(s.file, s.entries, s.with_image, s.text_only, s.image_root) for s in self.files]
        return tabulate(rows, ["file", "entries", "with image", "text only", "image folder"], "github")

    def _folder_table(self, summary: FileSummary, max_folders: int) -> str:
        shown = summary.images_by_folder.most_common(max_folders)
        rows = [
            (folder, summary.entries_by_folder[folder], images, summary.unusable_by_folder[folder])
            for folder, images in sorted(shown)
        ]
        if hidden := summary.images_by_folder.total() - sum(images for _, images in shown):
            left = [folder for folder in summary.images_by_folder if folder not in dict(shown)]
            entries, unusable = (
                sum(numbers[f] for f in left) for numbers in (summary.entries_by_folder, summary.unusable_by_folder)
            )
            rows.append((f"{len(left)} more folders", entries, hidden, unusable))
        return tabulate(rows, ["images in", "entries", "images", "missing or unusable"], "github") if rows else ""

    def _count_table(self) -> str:
        rows = [
            (count.what, count.found, count.published, "as published" if count.found == count.published else "DIFFERS")
            for summary in self.files
            for count in summary.counts
        ]
        return tabulate(rows, ["entries", "found", "published size", ""], "github")

    def _finding_table(self, examples: int) -> str:
        lines = []
        for kind, number in self._totals().items():
            label = "information" if kind in _INFORMATION else "PROBLEM"
            lines.append(f"{label}: {kind}: {number}")
            found = (finding for finding in self.findings if finding.kind == kind)
            lines += [f"  {finding.message}" for finding, _ in zip(found, range(examples), strict=False)]
            if number > examples:
                lines.append(f"  and {number - examples} more")
        return "\n".join(lines)
