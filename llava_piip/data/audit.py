"""Checking conversation files and their images before training: everything that is wrong, not only the first."""

from __future__ import annotations

import json
import os
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Literal, get_args

from PIL import Image
from tabulate import tabulate
from torch.utils.data import DataLoader
from tqdm import tqdm

from piip_core.errors import ConfigError, UserError, check_choice
from piip_core.files import write_atomically
from piip_core.images import image_formats

from .images import ImageFolder
from .published import PublishedSet
from .records import AnyPath, DataError, Problem, Record, parse_entry, read_entries

Decode = Literal["none", "header", "full"]

UNUSABLE_FILE = "file unusable"
EMPTY_ANSWER = "answer empty or missing"
_ORDER = (UNUSABLE_FILE, *(problem.value for problem in Problem), EMPTY_ANSWER)
_READING = {
    "none": "the images were not read, only looked up",
    "header": "of the images only the headers were read: decode=full finds truncated ones too",
    "full": "all images were decoded",
}
_CHUNK = 256  # images a worker process is handed at a time


@dataclass(frozen=True)
class Finding:
    """A problem: training would stop at the entry or skip it, wholly or in part."""

    file: str
    entry: int | None  # its index; None for what concerns the file
    kind: str  # a value of `Problem`, or one of this module's names
    message: str  # what was found, with the fix
    image: str | None = None  # if it is about one


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
    counts: list[tuple[str, int, int]] = field(default_factory=list)  # of what, found, published


@dataclass
class AuditReport:
    """The result of an audit."""

    decode: str  # how images were read
    files: list[FileSummary] = field(default_factory=list)
    problems: list[Finding] = field(default_factory=list)  # in the order of files and entries

    @property
    def ok(self) -> bool:
        """Whether there are no problems and every count is the published one."""
        return not self.problems and not self._other_counts()

    def _other_counts(self) -> int:
        return sum(found != published for summary in self.files for _, found, published in summary.counts)

    def write_json(self, path: AnyPath) -> None:
        """Writes everything as JSON; an interruption leaves the old file."""
        content = {
            "ok": self.ok,
            "decode": self.decode,
            "files": list(map(vars, self.files)),
            "totals": Counter(finding.kind for finding in self.problems),
            "problems": list(map(asdict, self.problems)),
        }
        with write_atomically(path, "w") as file:
            json.dump(content, file, indent=1)

    def summary(self, *, examples: int = 3, max_folders: int = 20) -> str:
        """Tables for people, with so many findings of each kind and so many image folders of each file."""
        files = [(s.file, s.entries, s.with_image, s.text_only, s.image_root) for s in self.files]
        parts = [tabulate(files, ["file", "entries", "with image", "text only", "image folder"], "github")]
        parts += [_folder_table(summary, max_folders) for summary in self.files]
        if counts := [count for summary in self.files for count in summary.counts]:
            rows = [(*count, "as published" if count[1] == count[2] else "DIFFERS") for count in counts]
            parts.append(tabulate(rows, ["entries", "found", "published size", ""], "github"))
        lines = []
        for kind in _ORDER:
            found = [finding.message for finding in self.problems if finding.kind == kind]
            lines += [f"PROBLEM: {kind}: {len(found)}"] if found else []
            lines += [f"  {message}" for message in found[:examples]]
            lines += [f"  and {len(found) - examples} more"] if len(found) > examples else []
        return "\n\n".join(filter(None, [*parts, "\n".join(lines)]))

    def verdict(self) -> str:
        """One line."""
        if self.ok:
            return f"Everything is in order ({_READING[self.decode]})."
        bad = {(finding.file, finding.entry) for finding in self.problems}
        numbers = {
            "unusable files": str(sum(entry is None for _, entry in bad)),
            "entries with problems": f"{sum(entry is not None for _, entry in bad)} of "
            f"{sum(summary.entries for summary in self.files)}",
            "counts that differ from the published ones": str(self._other_counts()),
        }
        found = [f"{what}: {number}" for what, number in numbers.items() if not number.startswith("0")]
        return f"{'; '.join(found)} ({_READING[self.decode]})."


def audit(
    annotations: Sequence[AnyPath],
    image_roots: Sequence[AnyPath],
    *,
    decode: Decode = "header",
    published: PublishedSet | None = None,
    workers: int | None = None,
    follow_links: bool = False,
) -> AuditReport:
    """Checks conversation files with their images and reports everything that training would stop at or skip.

    Args:
        annotations: Conversation files.
        image_roots: The folder that image names are relative to, or one per file.
        decode: How far images are read. "none": they exist, are not empty and lie in the folder. "header": and start
            like an image. "full": and can be decoded to the end.
        published: A data set whose sizes to compare with; for a single file.
        workers: Number of processes for the images; by default one per core.
        follow_links: Whether links below an image folder may lead out of it.

    Raises:
        ConfigError: If arguments do not fit together or there is no such image folder.
    """
    roots = list(image_roots) * (len(annotations) if len(image_roots) == 1 else 1)
    if not annotations or len(roots) != len(annotations):
        raise ConfigError(
            f"{len(roots)} image folders for {len(annotations)} conversation files: expected one, or one per file"
        )
    check_choice("decode", decode, get_args(Decode))
    report = AuditReport(decode)
    for file, root in zip(annotations, roots, strict=True):
        folder = ImageFolder(root, follow_links=follow_links)
        summary = FileSummary(str(Path(file)), str(folder.root))
        report.files.append(summary)
        report.problems += _audit_file(summary, folder, decode, published, workers)
    return report


def _audit_file(
    summary: FileSummary, folder: ImageFolder, decode: Decode, published: PublishedSet | None, workers: int | None
) -> list[Finding]:
    """What is found in one file, in the order of its entries; the summary takes its numbers."""
    findings: list[Finding] = []
    users: dict[str, list[tuple[int, str]]] = {}  # image -> entries that name it
    folder_of = partial(_folder_of, known=[] if published is None else published.relative_folders())
    for record in _records(summary, findings):
        for name in dict.fromkeys(record.images):
            users.setdefault(name, []).append((record.index, record.where))
        if record.images:
            summary.with_image += 1
            summary.entries_by_folder[folder_of(record.images[0])] += 1
        else:
            summary.text_only += 1
        if kind_and_message := _text_problem(record):
            findings.append(Finding(record.source, record.index, *kind_and_message))
    findings += image_findings(summary, users, folder, decode, workers, folder_of)
    if published is not None and summary.entries:
        found = Counter({"": summary.text_only})
        for place, number in summary.entries_by_folder.items():
            found[place.partition("/")[0]] += number
        summary.counts.append((f"{published.title}: all", summary.entries, published.records))
        for place, number in published.records_by_folder.items():
            summary.counts.append((f"images in {place}" if place else "text only", found[place], number))
    return sorted(findings, key=lambda finding: -1 if finding.entry is None else finding.entry)


def _records(summary: FileSummary, findings: list[Finding]) -> Iterator[Record]:
    """The well-formed entries of a file; adds findings for the others."""
    try:
        for index, entry in enumerate(read_entries(summary.file)):
            summary.entries += 1
            try:
                yield parse_entry(entry, summary.file, index)
            except DataError as error:
                findings.append(Finding(summary.file, index, error.problem.value, str(error)))
    except DataError as error:
        findings.append(Finding(summary.file, None, UNUSABLE_FILE, str(error)))


def _text_problem(record: Record) -> tuple[str, str] | None:
    """What is wrong with the conversation of an entry, if anything is: its kind, and a message."""
    try:
        messages = record.messages()
    except DataError as error:
        return error.problem.value, str(error)
    if messages[-1]["role"] == "user":
        return EMPTY_ANSWER, f"{record.where}: the last question has no answer: nothing to learn"
    greetings = len(record.conversations) - len(messages)
    for number, message in enumerate(messages, 1 + greetings):
        if message["role"] == "assistant" and not message["content"].strip():
            return EMPTY_ANSWER, f"{record.where}: turn {number} is an empty answer: nothing to learn"
    return None


def image_findings(
    summary: FileSummary,
    users: Mapping[str, Sequence[tuple[int, str]]],
    folder: ImageFolder,
    decode: Decode,
    workers: int | None,
    folder_of: Callable[[str], str],
) -> Iterator[Finding]:
    """Looks at images, in worker processes if there are many, and yields what it means for the entries that name them.

    `users` has index and name of the entries by image; `folder_of` says what folder an image counts for in `summary`.
    """
    workers = workers or (len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
    alone = workers == 1 or len(users) <= _CHUNK
    look = partial(_look_at, folder, decode)
    chunks = DataLoader(list(users), _CHUNK, num_workers=0 if alone else workers, collate_fn=look)
    try:
        for name, kind, message in tqdm(
            (found for chunk in chunks for found in chunk), "Images", len(users), unit=" images", disable=None
        ):
            summary.images_by_folder[folder_of(name)] += 1
            if kind is not None:
                summary.unusable_by_folder[folder_of(name)] += 1
                for index, where in users[name]:
                    yield Finding(summary.file, index, kind, f"{where}: {message}", name)
    except RuntimeError as error:
        raise UserError(
            f"a process that read images of {folder.root} ended: too little memory, or an image that crashes the "
            f"reader; workers=1 shows which ({error})"
        ) from error


def _look_at(folder: ImageFolder, decode: Decode, names: Sequence[str]) -> list[tuple[str, str | None, str]]:
    """For each image its name, and a kind of problem with the message, or None."""
    found: list[tuple[str, str | None, str]] = []
    for name in names:
        try:
            path = folder.locate(name)
            # A header that cannot be read: reading it all tells what is wrong in the words that training would use
            if decode == "full" or (decode == "header" and not _has_header(path)):
                folder.open(name)
            found.append((name, None, ""))
        except DataError as error:
            found.append((name, error.problem.value, str(error)))
    return found


def _has_header(path: Path) -> bool:
    """Whether a file starts like an image."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of metadata
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path, formats=image_formats()):
                return True
    except Exception:  # readers meet broken content with errors of many types
        return False


def _folder_of(name: str, known: Sequence[str]) -> str:
    """The known folder an image lies in, or else its first folder."""
    for folder in known:
        if folder == "." or name.startswith(f"{folder}/"):
            return folder
    parts = PurePosixPath(name).parts
    return parts[0] if len(parts) > 1 else "."


def _folder_table(summary: FileSummary, max_folders: int) -> str:
    shown = dict(summary.images_by_folder.most_common(max_folders))
    numbers = (summary.entries_by_folder, summary.images_by_folder, summary.unusable_by_folder)
    rows = [(folder, *(by_folder[folder] for by_folder in numbers)) for folder in sorted(shown)]
    if left := [folder for folder in summary.images_by_folder if folder not in shown]:
        sums = (sum(by_folder[folder] for folder in left) for by_folder in numbers)
        rows.append((f"{len(left)} more folders", *sums))
    return tabulate(rows, ["images in", "entries", "images", "missing or unusable"], "github") if rows else ""
