"""Reading every file of a data set before training: all that is wrong, not only the first."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence

import numpy as np

from piip_core.audit import Audit, Finding, SetAudit
from piip_core.errors import UserError

from .classification import folder_categories, list_images
from .dataset import DatasetError, first_few, read_all, read_image
from .label_maps import IGNORE_LABEL, LabelClasses, read_label_map
from .segmentation import Pair, match_files


def audit_label_maps(
    images: str,
    labels: str,
    classes: LabelClasses,
    *,
    title: str = "label maps",
    expected: int | None = None,
    workers: int | None = None,
) -> SetAudit:
    """Reads every image and label map of two folders to the end and reports everything that is wrong.

    `expected` is the number of images that there should be; files are read in `workers` threads, by default one per
    core.
    """
    result = SetAudit(title, expected)
    try:
        pairs, unmatched = match_files(images, labels)
    except DatasetError as error:
        result.add("folders unusable", images, str(error))
        return result
    result.compare("images with a label map", images, len(pairs), expected)
    for kind, paths in unmatched.items():
        for path in paths:
            result.add(kind, path, path)
    pixels = np.zeros(IGNORE_LABEL + 1, dtype=np.int64)
    for counts, problems in read_all(lambda pair: _check_pair(pair, classes), pairs, f"Reading {title}", workers):
        pixels += counts
        result.problems += problems
    result.warning = classes.absent(pixels)
    result.found = len(pairs)
    seen = np.count_nonzero(pixels[: classes.num_classes])
    ignored = pixels[-1] / max(pixels.sum(), 1)
    result.columns = {"classes seen": f"{seen} of {classes.num_classes}", "ignored pixels": f"{ignored:.1%}"}
    return result


def _check_pair(pair: Pair, classes: LabelClasses) -> tuple[np.ndarray, list[Finding]]:
    """Pixels of every class, and what is wrong."""
    problems, image, labels = [], None, None
    try:
        image = read_image(pair.image)
    except UserError as error:
        problems.append(Finding("image unreadable", pair.image, str(error)))
    try:
        labels = read_label_map(pair.labels, classes)
    except UserError as error:
        problems.append(Finding("label map unusable", pair.labels, str(error)))
    if image is not None and labels is not None and image.shape[:2] != labels.shape:
        sizes = [f"{height} x {width}" for height, width in (labels.shape, image.shape[:2])]
        message = f"{pair.labels}: {sizes[0]} (height x width), but its image is {sizes[1]} after EXIF rotation"
        problems.append(Finding("sizes differ", pair.labels, message))
    values = np.zeros(0, dtype=np.uint8) if labels is None else labels.reshape(-1)
    return np.bincount(values, minlength=IGNORE_LABEL + 1), problems


def audit_classes(
    parts: Sequence[tuple[str, str, int | None, int | None]],
    *,
    decode: bool = True,
    workers: int | None = None,
) -> Audit:
    """Counts the images of every class, reads them to the end and reports everything that is wrong.

    `parts` are title and folder of every set, and the numbers of classes and images that it should have, if known; all
    should have the classes of the first. Without `decode`, images are only counted.
    """
    sets: list[SetAudit] = []
    known: list[str] = []
    for title, folder, num_classes, num_images in parts:
        result = SetAudit(title, num_images)
        sets.append(result)
        try:
            names = [category.name for category in folder_categories(folder)]
        except DatasetError as error:
            result.add("folder unusable", folder, str(error))
            continue
        known = known or names
        if different := sorted({*names} ^ {*known}):
            message = f"{folder}: expected the classes of {parts[0][0]}; only one of both has {first_few(different)}"
            result.add("classes differ", folder, message)
        found = list_images(folder)
        counts = Counter(dict.fromkeys(names, 0))
        counts.update(names[label] for _, label in found)
        result.found = len(found)
        span = f"{min(counts.values())} to {max(counts.values())}"
        result.columns = {"classes": len(names), "images per class": span}
        for name in (name for name, count in counts.items() if not count):
            path = os.path.join(folder, name)
            result.add("class without images", path, f"{path}: holds no image")
        result.compare("classes", folder, len(names), num_classes)
        result.compare("images", folder, len(found), num_images)
        if decode:
            checked = read_all(_check_image, [path for path, _ in found], f"Reading {title}", workers)
            result.problems += [problem for problem in checked if problem is not None]
    return Audit(sets)


def _check_image(path: str) -> Finding | None:
    try:
        read_image(path)
    except UserError as error:
        return Finding("image unreadable", path, str(error))
    return None
