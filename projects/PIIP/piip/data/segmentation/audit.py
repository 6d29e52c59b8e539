"""Reading every image and label map of a data set before training: all that is wrong, not only the first."""

from __future__ import annotations

import numpy as np

from piip_core.errors import UserError

from ..audit import Problem, SetAudit, read_all
from ..dataset import DatasetError
from ..images import read_image
from .classes import IGNORE_LABEL, LabelClasses
from .folders import match_files
from .label_maps import read_label_map

__all__ = ["audit_label_maps"]


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

    The report holds the number of pixels of every class, and the part of all pixels that is to be ignored. `expected`
    is the number of images that there should be; files are read in `workers` threads, by default one per core.
    """
    result, number = SetAudit(title, expected), classes.num_classes
    try:
        pairs, without_labels, without_image, repeated = match_files(images, labels)
    except DatasetError as error:
        result.problems.append(("folders unusable", str(images), str(error)))
        return result
    if expected not in (None, len(pairs)):
        message = f"{images}: {len(pairs)} images with a label map: expected {expected}"
        result.problems.append(("number of images", str(images), message))
    for kind, paths, advice in (
        ("image without label map", without_labels, f"no label map of that name in {labels}"),
        ("label map without image", without_image, f"no image of that name in {images}"),
        ("several images or label maps of one name", repeated, "expected one image and one label map of each name"),
    ):
        result.problems += [(kind, path, f"{path}: {advice}") for path in paths]
    pixels = np.zeros(IGNORE_LABEL + 1, dtype=np.int64)
    paths = [(image, labels) for _, image, labels in pairs]
    checked = read_all(lambda pair: _check(*pair, classes), paths, title=title, workers=workers)
    for counts, problems in checked:
        pixels += counts
        result.problems += problems
    result.warning = classes.absent(pixels)
    ignored, seen = float(pixels[-1] / max(pixels.sum(), 1)), int(np.count_nonzero(pixels[:number]))
    result.images = len(pairs)
    result.columns = {"classes seen": f"{seen} of {number}", "ignored pixels": f"{ignored:.1%}"}
    result.details = {"num_classes": number, "pairs": len(pairs), "pixels": pixels[:number].tolist()}
    result.details["ignored"] = ignored
    return result


def _check(image_path: str, labels_path: str, classes: LabelClasses) -> tuple[np.ndarray, list[Problem]]:
    """Pixels of every class, and what is wrong."""
    problems, image, labels = [], None, None
    try:
        image = read_image(image_path)
    except UserError as error:
        problems.append(("image unreadable", image_path, str(error)))
    try:
        labels = read_label_map(labels_path, classes)
    except UserError as error:
        problems.append(("label map unusable", labels_path, str(error)))
    if image is not None and labels is not None and image.shape[:2] != labels.shape:
        sizes = [f"{height} x {width}" for height, width in (labels.shape, image.shape[:2])]
        message = f"{labels_path}: {sizes[0]} (height x width), but its image is {sizes[1]} after EXIF rotation"
        problems.append(("sizes differ", labels_path, message))
    values = np.zeros(0, dtype=np.uint8) if labels is None else labels.reshape(-1)
    return np.bincount(values, minlength=IGNORE_LABEL + 1), problems
