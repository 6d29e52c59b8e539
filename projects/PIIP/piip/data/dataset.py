"""What data sets of every kind share: classes, files in folders, images, and errors that say what is wrong."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import TypeVar

import numpy as np
from detectron2.utils.file_io import PathManager
from tqdm import tqdm

from piip_core import images
from piip_core.errors import UserError

logger = logging.getLogger(__name__)

_SHOWN = 3  # entries named per complaint; the rest is counted
READERS = 16  # threads that read headers, which is waiting for the disk

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")


class DatasetError(UserError):
    """A data set that cannot be used as it is; the message names the file, the entry and what was expected."""


@dataclass(frozen=True)
class Category:
    """One class of a data set: its id in the annotations and its name."""

    id: int
    name: str


def first_few(found: Sequence[str]) -> str:
    """The first entries of a complaint, and how many more there are."""
    more = len(found) - _SHOWN
    return ", ".join(found[:_SHOWN]) + (f" and {more} more" if more > 0 else "")


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
    """Raises DatasetError if the configuration gives another number of classes than the data set has."""
    if num_classes not in (None, found):
        raise DatasetError(
            f"{what}, but the configuration says data.num_classes={num_classes}. Set data.num_classes={found} "
            "(tools/lazyconfig_train_net.py of this project does so by itself)"
        )


def check_same_classes(path: str, classes: Sequence[Category], other: str, others: Sequence[Category]) -> None:
    """Raises DatasetError if two data sets have different classes; the message says which."""
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


def find_files(folder: str, endings: Collection[str]) -> tuple[list[str], list[str]]:
    """Files in a folder and below, in the order of folders and names: those with one of the endings, and the others.

    Endings are in lower case, files may have them in upper case. Hidden files and folders are left out. Links to
    folders are followed, but not where they lead back up.

    Raises:
        DatasetError: If a folder cannot be listed.
    """

    def refuse(error: OSError) -> None:
        message = f"{error.filename}: cannot be listed ({error.strerror}): expected a readable folder"
        raise DatasetError(message) from error

    found, others = [], []
    for root, folders, names in os.walk(folder, onerror=refuse, followlinks=True):
        folders[:] = [name for name in folders if name[0] != "." and not leads_up(os.path.join(root, name))]
        for name in names:
            if name[0] != ".":
                known = os.path.splitext(name)[1].lower() in endings
                (found if known else others).append(os.path.join(root, name))
    return sorted(found, key=os.path.split), sorted(others, key=os.path.split)


def leads_up(folder: str) -> bool:
    """Whether a folder is a link to one that it lies in; if so, a warning says it."""
    if not os.path.islink(folder):
        return False
    target = os.path.realpath(folder)
    up = any(above.resolve().is_relative_to(target) for above in Path(os.path.abspath(folder)).parents)
    if up:
        logger.warning("%s: is a link to a folder that it lies in, and is not followed", folder)
    return up


def warn_left_out(folder: str, what: str, paths: Sequence[str]) -> None:
    """Says how many files are left out for their endings, and names the first."""
    if paths:
        count = len(paths)
        logger.warning("%s: %d files do not end as %s and are left out: %s", folder, count, what, first_few(paths))


def read_all(
    read: Callable[[_Item], _Result], items: Sequence[_Item], title: str, workers: int | None = None
) -> Iterator[_Result]:
    """Reads files in so many threads (None: one per core), and gives the results in order, with a progress bar."""
    with ThreadPool(workers) as pool:
        yield from tqdm(pool.imap(read, items, 8), title, len(items), unit="image", delay=2, disable=None)


def read_image_size(path: str) -> tuple[int, int]:
    """Height and width of an image after EXIF rotation, from its header alone; errors as in `read_image`."""
    with images.opened_image(path, PathManager.open) as image:
        images.check_values(path, image)
        return images.image_size(image)


def read_image(path: str, image_format: str = "RGB") -> np.ndarray:
    """`piip_core.images.read_image` in Detectron2's order of channels: (H, W, 3) uint8, "RGB" or "BGR"."""
    pixels = images.read_image(path, PathManager.open)
    return pixels[:, :, ::-1] if image_format == "BGR" else pixels
