"""Checking conversation files and their images before training: everything that is wrong, not only the first."""

from __future__ import annotations

import os
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Literal, get_args

from PIL import Image
from torch.utils.data import DataLoader
from tqdm import tqdm

from piip_core.audit import Audit, SetAudit
from piip_core.errors import ConfigError, UserError, check_choice
from piip_core.images import image_formats

from .images import ImageFolder
from .published import PublishedSet
from .records import AnyPath, DataError, Record, parse_entry, read_entries

Decode = Literal["none", "header", "full"]

UNUSABLE_FILE = "file unusable"
EMPTY_ANSWER = "answer empty or missing"
READING = {
    "none": "(The images were not read, only looked up.)",
    "header": "(Of the images only the headers were read: full decoding finds truncated ones too.)",
    "full": "(All images were decoded.)",
}
_CHUNK = 256  # images a worker process is handed at a time
_MOST_FOLDERS = 20  # of images that are told apart


def audit(
    annotations: Sequence[AnyPath],
    image_roots: Sequence[AnyPath],
    *,
    decode: Decode = "header",
    published: PublishedSet | None = None,
    workers: int | None = None,
    follow_links: bool = False,
) -> Audit:
    """Checks conversation files with their images and reports everything that training would stop at or skip.

    Args:
        annotations: Conversation files.
        image_roots: The folder that image names are relative to, or one per file.
        decode: How far images are read. "none": they exist, are not empty and lie in the folder. "header": and start
            like an image. "full": and can be decoded to the end.
        published: A data set whose sizes to compare with; for a single file.
        workers: Number of processes for the images; by default one per core.
        follow_links: Whether links below an image folder may lead out of it.

    Returns:
        A set of entries for each file, and one of images for each folder that they lie in.

    Raises:
        ConfigError: If arguments do not fit together or there is no such image folder.
    """
    roots = list(image_roots) * (len(annotations) if len(image_roots) == 1 else 1)
    if not annotations or len(roots) != len(annotations):
        raise ConfigError(
            f"{len(roots)} image folders for {len(annotations)} conversation files: expected one, or one per file"
        )
    check_choice("decode", decode, get_args(Decode))
    sets: list[SetAudit] = []
    for file, root in zip(annotations, roots, strict=True):
        folder = ImageFolder(root, follow_links=follow_links)
        entries, users = _audit_entries(str(Path(file)), published)
        sets += [entries, *audit_images(users, folder, decode, workers)]
    return Audit(sets, READING[decode])


def _audit_entries(file: str, published: PublishedSet | None) -> tuple[SetAudit, dict[str, list[tuple[int, str]]]]:
    """What is found in the entries of a file; and the images with index and name of the entries that name them."""
    result = SetAudit(file, published and published.records)
    users: dict[str, list[tuple[int, str]]] = {}
    by_folder: Counter[str] = Counter()  # of their first image, "" for none
    for record in _records(result):
        for name in dict.fromkeys(record.images):
            users.setdefault(name, []).append((record.index, record.where))
        by_folder[_first_folder(record.images[0]) if record.images else ""] += 1
        if kind_and_message := _text_problem(record):
            kind, message = kind_and_message
            result.add(kind, file, message, record.index)
    result.columns = {"text only": by_folder[""]}
    if published is not None and result.found:
        result.compare("entries", file, result.found, published.records)
        for folder, number in published.records_by_folder.items():
            what = f"entries with images in {folder}" if folder else "entries of text only"
            result.compare(what, file, by_folder[folder], number)
    return result, users


def _records(result: SetAudit) -> Iterator[Record]:
    """The well-formed entries of a file; adds problems for the others."""
    file = result.title
    try:
        for index, entry in enumerate(read_entries(file)):
            result.found += 1
            try:
                yield parse_entry(entry, file, index)
            except DataError as error:
                result.add(error.problem.value, file, str(error), index)
    except DataError as error:
        result.add(UNUSABLE_FILE, file, str(error))


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


def audit_images(
    users: Mapping[str, Sequence[tuple[int, str]]], folder: ImageFolder, decode: Decode, workers: int | None
) -> list[SetAudit]:
    """Looks at images, in worker processes if there are many: a set for each folder, the largest ones apart.

    `users` has index and name of the entries by image; each of them gets a problem where its image has one.
    """
    workers = workers or (len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
    alone = workers == 1 or len(users) <= _CHUNK
    chunks = DataLoader(
        list(users), _CHUNK, num_workers=0 if alone else workers, collate_fn=partial(_look_at, folder, decode)
    )
    largest = Counter(map(_first_folder, users)).most_common(_MOST_FOLDERS)
    sets = {name: SetAudit(str(folder.root / name)) for name, _ in sorted(largest)}
    others = SetAudit(f"{folder.root}: other folders")
    looked_at = (found for chunk in chunks for found in chunk)
    try:
        for name, kind, message in tqdm(looked_at, "Images", len(users), unit=" images", disable=None):
            part = sets.get(_first_folder(name), others)
            part.found += 1
            for index, where in users[name] if kind else ():
                part.add(kind, name, f"{where}: {message}", index)
    except RuntimeError as error:
        raise UserError(
            f"a process that read images of {folder.root} ended: too little memory, or an image that crashes the "
            f"reader; workers=1 shows which ({error})"
        ) from error
    return [*sets.values(), *([others] if others.found else [])]


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


def _first_folder(name: str) -> str:
    parts = PurePosixPath(name).parts
    return parts[0] if len(parts) > 1 else "."
