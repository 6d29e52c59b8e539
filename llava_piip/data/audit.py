"""Checking conversation files and their images before training: everything that is wrong, not only the first."""

from __future__ import annotations

import os
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import nullcontext
from functools import partial
from itertools import chain
from pathlib import Path, PurePosixPath
from typing import Literal, get_args

from PIL import Image
from tqdm import tqdm

from piip_core.errors import ConfigError, UserError

from ..conversation import IMAGE_TAG, ConversationError, messages_from_llava
from .audit_report import (
    EMPTY_ANSWER,
    OTHER_FORMAT,
    REPEATED_ID,
    UNUSABLE_FILE,
    AuditReport,
    Count,
    FileSummary,
    Finding,
)
from .dataset import count_placeholders
from .images import FORMAT_OF_SUFFIX, ImageFolder
from .own_annotations import write_entries
from .problems import DataError, Problem
from .published import PublishedSet
from .records import Record, parse_entry, read_entries

__all__ = ["Decode", "audit", "image_findings", "write_clean"]

Decode = Literal["none", "header", "full"]
AnyPath = str | os.PathLike[str]

_CHUNK = 256  # images a worker process is handed at a time


def audit(
    annotations: AnyPath | Sequence[AnyPath],
    image_roots: AnyPath | Sequence[AnyPath],
    *,
    decode: Decode = "header",
    published: PublishedSet | None = None,
    workers: int | None = None,
    follow_links: bool = False,
) -> AuditReport:
    """Checks conversation files with their images and reports everything found.

    Problems are what training stops at or skips (`Problem`), and answers that are empty or missing. Information is what
    is harmless: ids that repeat, and images in another format than their name says.

    Args:
        annotations: A conversation file, or several.
        image_roots: The folder that image names are relative to, or one per file.
        decode: How far images are read. "none": they exist, are not empty and lie in the folder. "header": and start
            like an image. "full": and can be decoded to the end.
        published: A data set whose sizes to compare with; for a single file.
        workers: Number of processes for the images; by default one per core.
        follow_links: Whether links below an image folder may lead out of it.

    Raises:
        ConfigError: If arguments do not fit together or there is no such image folder.
    """
    files = [annotations] if isinstance(annotations, (str, os.PathLike)) else list(annotations)
    roots = [image_roots] if isinstance(image_roots, (str, os.PathLike)) else list(image_roots)
    if len(roots) == 1:
        roots *= len(files)
    if not files or len(roots) != len(files):
        raise ConfigError(
            f"{len(roots)} image folders for {len(files)} conversation files: expected one, or one per file"
        )
    if decode not in get_args(Decode):
        raise ConfigError(f"decode={decode!r}: expected {', '.join(get_args(Decode))}")
    if published is not None and len(files) > 1:
        raise ConfigError(f"{len(files)} files to compare with the sizes of {published.title}: expected one")
    report = AuditReport(decode)
    for file, root in zip(files, roots, strict=True):
        _audit_file(report, Path(file), ImageFolder(root, follow_links=follow_links), published, workers)
    return report


def write_clean(report: AuditReport, annotations: AnyPath, output: AnyPath) -> int:
    """Writes a file without the entries that have a problem, `.json` or `.jsonl`, and returns how many it has.

    Raises:
        UserError: If the file was not audited or could not be read to its end, would be overwritten, or no entry is
            left.
    """
    path, output = Path(annotations), Path(output)
    if str(path) not in [summary.file for summary in report.files]:
        raise UserError(f"{path}: is not one of the files of this audit")
    bad = {finding.entry for finding in report.problems if finding.file == str(path)}
    if None in bad:
        raise UserError(f"{path}: could not be read to its end, so what is good cannot be told; repair it first")
    if output.exists() and output.samefile(path):
        raise UserError(f"{output}: is the file that was audited; choose another name")
    good = (text for index, (_, text) in enumerate(read_entries(path)) if index not in bad)
    first = next(good, None)
    if first is None:
        raise UserError(f"{path}: has no entry without a problem; is the image folder the right one?")
    return write_entries(output, chain([first], good))


def _audit_file(
    report: AuditReport, path: Path, folder: ImageFolder, published: PublishedSet | None, workers: int | None
) -> None:
    """Adds one file to a report."""
    summary = FileSummary(str(path), str(folder.root))
    report.files.append(summary)
    users: dict[str, list[tuple[int, str]]] = {}  # image -> entries that name it
    findings: list[Finding] = []
    first_by_id: dict[str, int] = {}
    folder_of = partial(_folder_of, known=[] if published is None else published.relative_folders())
    for record in _records(path, summary, findings):
        summary.with_image += bool(record.images)
        summary.text_only += not record.images
        for name in dict.fromkeys(record.images):
            users.setdefault(name, []).append((record.index, record.id))
        if record.images:
            summary.entries_by_folder[folder_of(record.images[0])] += 1
        findings += _text_findings(record)
        if (first := first_by_id.setdefault(record.id, record.index)) != record.index:
            findings.append(_finding(record, REPEATED_ID, f"{record.where}: entry {first} has the same id"))
    findings += image_findings(summary, users, folder, report.decode, workers, folder_of)
    report.findings += sorted(findings, key=lambda finding: -1 if finding.entry is None else finding.entry)
    if published is not None and summary.entries:
        summary.counts += _counts(summary, published)


def _records(path: Path, summary: FileSummary, findings: list[Finding]) -> Iterator[Record]:
    """The well-formed entries of a file; adds findings for the others."""
    try:
        for index, (entry, _) in enumerate(read_entries(path)):
            summary.entries += 1
            try:
                record = parse_entry(entry, str(path), index)
            except DataError as error:
                findings.append(Finding(str(path), index, None, error.problem.value, None, str(error)))
            else:
                yield record
    except DataError as error:
        findings.append(Finding(str(path), None, None, UNUSABLE_FILE, None, str(error)))


def _text_findings(record: Record) -> Iterator[Finding]:
    """What is wrong with the conversation of an entry."""
    try:
        messages = messages_from_llava(record.conversations, has_image=len(record.images) == 1)
    except ConversationError as error:
        yield _finding(record, Problem.CONVERSATION.value, f"{record.where}: {error}")
        return
    found = count_placeholders(messages, has_images=bool(record.images))
    if found != len(record.images):
        message = f"{found} placeholders {IMAGE_TAG} for {len(record.images)} images; correct the entry"
        yield _finding(record, Problem.PLACEHOLDERS.value, f"{record.where}: {message}")
    # A greeting before the first question is not trained on
    answers = [(turn, said) for turn, said in enumerate(record.conversations, 1) if said["from"] == "gpt" and turn > 1]
    if empty := [turn for turn, said in answers if not said["value"].strip()]:
        yield _finding(record, EMPTY_ANSWER, f"{record.where}: turn {empty[0]} is an empty answer: nothing to learn")
    elif messages[-1]["role"] == "user":
        yield _finding(record, EMPTY_ANSWER, f"{record.where}: the last question has no answer: nothing to learn")


def image_findings(
    summary: FileSummary,
    users: Mapping[str, Sequence[tuple[int, str]]],
    folder: ImageFolder,
    decode: str,
    workers: int | None,
    folder_of: Callable[[str], str],
) -> Iterator[Finding]:
    """Looks at images, in worker processes if there are many, and yields what it means for the entries that name them.

    Args:
        summary: Of the file with the entries; takes the numbers of images.
        users: Index and id of the entries that name each image.
        folder: Where the images are.
        decode: See `audit`, as for `workers`.
        workers: Number of processes.
        folder_of: The folder that an image counts for.

    Raises:
        UserError: If a process ends while it reads images.
    """
    workers = workers or (len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
    alone = workers <= 1 or len(users) <= _CHUNK
    with nullcontext() if alone else ProcessPoolExecutor(min(workers, -(-len(users) // _CHUNK))) as pool:
        look = partial(_look, folder, decode)
        try:
            looks = map(look, users) if pool is None else pool.map(look, users, chunksize=_CHUNK)
            bar = tqdm(looks, "Images", len(users), unit=" images", disable=None)
            for (name, entries), (problem, found) in zip(users.items(), bar, strict=True):
                summary.images_by_folder[folder_of(name)] += 1
                summary.unusable_by_folder[folder_of(name)] += problem is not None
                expected = FORMAT_OF_SUFFIX.get(PurePosixPath(name).suffix.lower())
                if problem is not None:
                    kind, message = problem, found
                elif None not in (found, expected) and found != expected:
                    kind, message = OTHER_FORMAT, f"image {name!r} is a {found} file"
                else:
                    continue
                for index, record_id in entries:
                    where = f"{summary.file}: entry {index} (id {record_id!r})"
                    yield Finding(summary.file, index, record_id, kind, name, f"{where}: {message}")
        except BrokenProcessPool as error:
            raise UserError(
                f"a process that read images of {folder.root} ended: too little memory, or an image that crashes the "
                "reader; workers=1 shows which"
            ) from error
        finally:
            if pool is not None:
                pool.shutdown(wait=False, cancel_futures=True)


def _look(folder: ImageFolder, decode: str, name: str) -> tuple[str | None, str | None]:
    """A value of `Problem` and the message; or None and the image's format, as far as it was looked at."""
    try:
        path = folder.locate(name)
        found = None if decode == "none" else _format(path)
        # A header that cannot be read: reading it all tells what is wrong in the words that training would use
        if decode == "full" or (decode == "header" and found is None):
            folder.open(name)
    except DataError as error:
        return error.problem.value, str(error)
    return None, found


def _format(path: Path) -> str | None:
    """The format of an image file by its content, from the header alone; None if it is no image."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of metadata
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path, formats=sorted(set(FORMAT_OF_SUFFIX.values()))) as image:
                # A phone's JPEG with a second image inside
                return "JPEG" if image.format == "MPO" else image.format
    except Exception:  # readers meet broken content with errors of many types
        return None


def _finding(record: Record, kind: str, message: str) -> Finding:
    return Finding(record.source, record.index, record.id, kind, None, message)


def _folder_of(name: str, known: Sequence[str]) -> str:
    """The known folder an image lies in, or else its first folder."""
    for folder in known:
        if folder == "." or name.startswith(f"{folder}/"):
            return folder
    parts = PurePosixPath(name).parts
    return parts[0] if len(parts) > 1 else "."


def _counts(summary: FileSummary, published: PublishedSet) -> list[Count]:
    """The comparison with the published sizes."""
    found = Counter({"": summary.text_only})
    for folder, number in summary.entries_by_folder.items():
        found[folder.partition("/")[0]] += number
    return [Count(f"{published.title}: all", summary.entries, published.records)] + [
        Count(f"images in {folder}" if folder else "text only", found[folder], number)
        for folder, number in published.records_by_folder.items()
    ]
