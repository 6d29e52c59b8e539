"""A folder of images and a folder of label maps as a data set in Detectron2's form."""

from __future__ import annotations

import logging
import os
import unicodedata
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from piip_core.images import UnreadableImageError, image_endings

from ..dataset import DatasetError, check_num_classes, existing_folder, first_few
from ..files import find_files, named_endings, warn_left_out
from ..images import read_image_size
from .classes import IGNORE_LABEL, LabelClasses, label_classes
from .label_maps import LABEL_ENDING, check_label_header, read_label_map

__all__ = ["Pair", "find_pairs", "get_sem_seg_dicts", "match_files"]

logger = logging.getLogger(__name__)

_READERS = 16  # threads: reading headers is waiting for the disk
_LOOKED_AT = 2000  # label maps that are read for their classes, at most


class Pair(NamedTuple):
    """Paths of an image and its label map, and what both have in common: the path below their folder.

    The `name` has no ending, composed accents and slashes.
    """

    name: str
    image: str
    labels: str


def match_files(images: str, labels: str) -> tuple[list[Pair], list[str], list[str], list[str]]:
    """Looks for images and their label maps by equal names; subfolders count, hidden files do not.

    Names that differ in Unicode's form of accents only are equal, and a back-slash is as good as a subfolder.

    Returns:
        Images with their label maps in the order of the names; images without label map; label maps without image;
        names of several images, or of several label maps.

    Raises:
        DatasetError: If a folder is missing or empty, or both are the same.
    """
    by_name, repeated = _files(images, image_endings(), "images")
    maps, more = _files(labels, (LABEL_ENDING,), "labels")
    if os.path.realpath(images) == os.path.realpath(labels):
        raise DatasetError(f"{images}: images and label maps are in the same folder: expected two")
    pairs = [Pair(name, by_name[name], maps[name]) for name in sorted(by_name) if name in maps]
    without_labels = [by_name[name] for name in sorted(by_name) if name not in maps]
    without_image = [maps[name] for name in sorted(maps) if name not in by_name]
    return pairs, without_labels, without_image, repeated + more


def find_pairs(images: str, labels: str) -> list[Pair]:
    """Images and their label maps, all of them; see `match_files`.

    Raises:
        DatasetError: Also if an image has no label map, or two images or label maps have the same name.
    """
    pairs, without_labels, without_image, repeated = match_files(images, labels)
    if repeated:
        raise DatasetError(
            f"{images}, {labels}: {len(repeated)} names of several images, or of several label maps, that differ "
            f"only in the ending or in how accents and folders are written: {first_few(repeated)}"
        )
    if without_labels:
        raise DatasetError(
            f"{labels}: {len(without_labels)} images have no label map of the same name that ends in "
            f"{LABEL_ENDING}: {first_few(without_labels)}"
        )
    if without_image:
        logger.warning(
            "%s: %d label maps without an image in %s are left out: %s",
            labels,
            len(without_image),
            images,
            first_few(without_image),
        )
    return pairs


def get_sem_seg_dicts(
    images: str,
    labels: str,
    *,
    classes: str | int | Sequence[str],
    reduce_zero_label: bool | None = None,
    num_classes: int | None = None,
) -> list[dict[str, Any]]:
    """Loads a folder of images and a folder of label maps in Detectron2's standard form, after checking them.

    Of the images only the headers are read; label maps are read until every class was seen, at most 2000 of them. A
    class that was not is warned about.

    Args:
        images: Folder of images; subfolders count.
        labels: Folder of label maps: PNG files of one channel, named as the images.
        classes: As in `label_classes`, with `reduce_zero_label`.
        reduce_zero_label: See `classes`.
        num_classes: If given, the number that `classes` must have.

    Returns:
        One dict per image with file_name, sem_seg_file_name, image_id, height and width, in the order of the names.

    Raises:
        UserError: If a folder, the classes, a file or a pair of files cannot be used, or a value in one of the label
            maps that are read stands for nothing; the message names it.
    """
    known = label_classes(classes, reduce_zero_label)
    check_num_classes(known.num_classes, f"{known.num_classes} classes", num_classes)
    pairs = find_pairs(images, labels)
    with ThreadPoolExecutor(_READERS) as readers:
        progress = tqdm(
            readers.map(_sizes, pairs), total=len(pairs), desc=f"Checking {images}", unit="image", delay=2, disable=None
        )
        sizes = list(progress)
    different = [
        f"{pair.labels} is {label}, its image {image}"
        for pair, (image, label) in zip(pairs, sizes, strict=True)
        if image != label
    ]
    if different:
        raise DatasetError(
            f"{labels}: {len(different)} label maps have another size (height, width, after EXIF rotation) than their "
            f"image: {first_few(different)}"
        )
    _warn_absent(labels, pairs, known)
    return [
        {
            "file_name": pair.image,
            "sem_seg_file_name": pair.labels,
            "image_id": pair.name,
            "height": height,
            "width": width,
        }
        for pair, ((height, width), _) in zip(pairs, sizes, strict=True)
    ]


def _sizes(pair: Pair) -> tuple[tuple[int, int], tuple[int, int]]:
    return read_image_size(pair.image), check_label_header(pair.labels)


def _warn_absent(labels: str, pairs: Sequence[Pair], classes: LabelClasses) -> None:
    """Reads label maps, in an order that is random but the same every time, until every class was seen."""
    order = np.random.default_rng(0).permutation(len(pairs))[:_LOOKED_AT]
    pixels = np.zeros(IGNORE_LABEL + 1, dtype=np.int64)
    with ThreadPoolExecutor(_READERS) as readers:
        for start in range(0, len(order), 4 * _READERS):
            some = [pairs[index] for index in order[start : start + 4 * _READERS]]
            pixels += sum(readers.map(lambda pair: _count(pair, classes), some))
            if pixels[: classes.num_classes].all():
                return
    looked = "all" if len(order) == len(pairs) else f"{len(order)} of"
    logger.warning("%s: %s (%s %d were looked at)", labels, classes.absent(pixels), looked, len(pairs))


def _count(pair: Pair, classes: LabelClasses) -> np.ndarray:
    try:
        return np.bincount(read_label_map(pair.labels, classes).reshape(-1), minlength=IGNORE_LABEL + 1)
    except UnreadableImageError:  # which training stops at, or skips
        return np.zeros(IGNORE_LABEL + 1, dtype=np.int64)


def _files(folder: str, endings: Sequence[str], what: str) -> tuple[dict[str, str], list[str]]:
    """Name -> path of the files with one of the endings, and names that several of them have."""
    root = existing_folder(folder, f"a folder of {what}", what)
    files, others = find_files(root, endings)
    if not files:
        seen = f"; there are {len(others)} other files, such as {others[0]}" if others else ""
        raise DatasetError(f"{folder}: no {what}: expected files that end in {named_endings(endings)}{seen}")
    warn_left_out(folder, what, others)
    found: dict[str, str] = {}
    repeated = []
    for path in files:
        stem = os.path.splitext(os.path.relpath(path, root))[0]
        name = unicodedata.normalize("NFC", stem).replace("\\", "/")
        if found.setdefault(name, path) != path:
            repeated.append(name)
    return found, sorted(repeated)
