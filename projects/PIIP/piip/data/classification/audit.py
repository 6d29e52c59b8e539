"""Counting and reading every image of folders of classes before training: all that is wrong, not only the first."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence

from piip_core.errors import UserError

from ..audit import Audit, Problem, SetAudit, read_all
from ..dataset import DatasetError, first_few
from ..images import read_image
from .folders import folder_categories, list_images

__all__ = ["audit_classes"]


def audit_classes(
    parts: Sequence[tuple[str, str, int | None, int | None]],
    *,
    decode: bool = True,
    workers: int | None = None,
) -> Audit:
    """Counts the images of every class, reads them to the end and reports everything that is wrong.

    Args:
        parts: Title and folder of every set, and the numbers of classes and images that it should have, if known. All
            should have the classes of the first.
        decode: Read every image to the end; otherwise they are counted only.
        workers: Files that are read at the same time; by default one per core.
    """
    sets = [_audit(*part, decode, workers) for part in parts]
    for (_, folder, _, _), part in zip(parts[1:], sets[1:], strict=True):
        first, other = (each.details.get("images", {}).keys() for each in (sets[0], part))
        if first and other and first != other:
            different = sorted(first ^ other)
            message = f"{folder}: expected the classes of {sets[0].title}; only one of both has {first_few(different)}"
            part.problems.append(("classes differ", folder, message))
    return Audit(sets)


def _audit(
    title: str,
    folder: str,
    classes: int | None,
    images: int | None,
    decode: bool,
    workers: int | None,
) -> SetAudit:
    result = SetAudit(title, images)
    try:
        names = [category.name for category in folder_categories(folder)]
    except DatasetError as error:
        result.problems.append(("folder unusable", folder, str(error)))
        return result
    found = list_images(folder)
    counts = Counter(label for _, label in found)
    of_classes = {name: counts[label] for label, name in enumerate(names)}
    span = f"{min(of_classes.values())} to {max(of_classes.values())}"
    result.images = len(found)
    result.columns = {"classes": len(names), "images per class": span}
    result.details = {"images": of_classes}
    for name in (name for name, count in of_classes.items() if not count):
        path = os.path.join(folder, name)
        result.problems.append(("class without images", path, f"{path}: holds no image"))
    for what, number, expected in (("classes", len(names), classes), ("images", len(found), images)):
        if expected not in (None, number):
            result.problems.append(
                ("number of classes or images", folder, f"{folder}: {number} {what}: expected {expected}")
            )
    if decode:
        paths = [path for path, _ in found]
        checked = read_all(_problem, paths, title=title, workers=workers)
        result.problems += [problem for problem in checked if problem is not None]
    return result


def _problem(path: str) -> Problem | None:
    try:
        read_image(path)
    except UserError as error:
        return "image unreadable", path, str(error)
    return None
