"""Counting and reading every image of folders of classes before training: all that is wrong, not only the first."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field

from tabulate import tabulate

from piip_core.errors import UserError
from piip_core.files import write_atomically

from ..audit import Problem, list_problems, problems_as_dicts, read_all
from ..errors import DatasetError, first_few
from ..images import read_image
from .folders import folder_categories, list_images

__all__ = ["ClassAudit", "SetAudit", "audit_classes"]

_FOLDER = "folder unusable"
_EMPTY = "class without images"
_OTHER_CLASSES = "classes differ"
_OTHER_COUNT = "number of classes or images"
_BAD_IMAGE = "image unreadable"


@dataclass
class SetAudit:
    """What was found in one set.

    Attributes:
        title: Name of the set.
        expected: Number of images that there should be, if known.
        images: Number of images of every class, by its name.
        problems: Kind, path and message of everything that is wrong.
    """

    title: str
    expected: int | None = None
    images: dict[str, int] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)


@dataclass
class ClassAudit:
    """What was found in all sets."""

    sets: list[SetAudit] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """Whether nothing is wrong."""
        return not any(part.problems for part in self.sets)

    def summary(self, examples: int = 3) -> str:
        """A table of the sets, and of every kind of problem the first examples."""
        rows = []
        for part in self.sets:
            counts = sorted(part.images.values()) or [0]
            expected = "" if part.expected is None else part.expected
            span = f"{counts[0]} to {counts[-1]}"
            rows.append((part.title, sum(counts), expected, len(part.images), span, len(part.problems)))
        header = ["set", "images", "expected", "classes", "images per class", "problems"]
        lines = [tabulate(rows, header, "github")]
        for part in self.sets:
            lines += list_problems(part.title, part.problems, examples)
        return "\n".join(lines)

    def write_json(self, path: str | os.PathLike[str]) -> None:
        """Writes everything found."""
        content = [asdict(part) | {"problems": problems_as_dicts(part.problems)} for part in self.sets]
        with write_atomically(path, "w") as file:
            json.dump({"sets": content}, file, indent=1)


def audit_classes(
    parts: Sequence[tuple[str, str, int | None, int | None]],
    *,
    decode: bool = True,
    workers: int | None = None,
    progress: bool = True,
) -> ClassAudit:
    """Counts the images of every class, reads them to the end and reports everything that is wrong.

    Args:
        parts: Title and folder of every set, and the numbers of classes and images that it should have, if known. All
            should have the classes of the first.
        decode: Read every image to the end; otherwise they are counted only.
        workers: Files that are read at the same time; by default one per core.
        progress: Show progress bars.
    """
    sets = [_audit(*part, decode, workers, progress) for part in parts]
    for (_, folder, _, _), part in zip(parts[1:], sets[1:], strict=True):
        if part.images and sets[0].images and part.images.keys() != sets[0].images.keys():
            different = sorted(part.images.keys() ^ sets[0].images.keys())
            message = f"{folder}: expected the classes of {sets[0].title}; only one of both has {first_few(different)}"
            part.problems.append((_OTHER_CLASSES, folder, message))
    return ClassAudit(sets)


def _audit(
    title: str,
    folder: str,
    classes: int | None,
    images: int | None,
    decode: bool,
    workers: int | None,
    progress: bool,
) -> SetAudit:
    result = SetAudit(title, images)
    try:
        names = [category.name for category in folder_categories(folder)]
    except DatasetError as error:
        result.problems.append((_FOLDER, folder, str(error)))
        return result
    found = list_images(folder)
    counts = Counter(label for _, label in found)
    result.images = {name: counts[label] for label, name in enumerate(names)}
    for name in (name for name, count in result.images.items() if not count):
        path = os.path.join(folder, name)
        result.problems.append((_EMPTY, path, f"{path}: holds no image"))
    for what, number, expected in (("classes", len(names), classes), ("images", len(found), images)):
        if expected not in (None, number):
            result.problems.append((_OTHER_COUNT, folder, f"{folder}: {number} {what}: expected {expected}"))
    if decode:
        paths = [path for path, _ in found]
        checked = read_all(_problem, paths, title=title, workers=workers, progress=progress)
        result.problems += [problem for problem in checked if problem is not None]
    return result


def _problem(path: str) -> Problem | None:
    try:
        read_image(path)
    except UserError as error:
        return _BAD_IMAGE, path, str(error)
    return None
