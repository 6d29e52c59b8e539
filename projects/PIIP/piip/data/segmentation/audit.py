"""Reading every image and label map of a data set before training: all that is wrong, not only the first."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, field

import numpy as np
from tabulate import tabulate

from piip_core.errors import UserError
from piip_core.files import write_atomically

from ..audit import Problem, list_problems, problems_as_dicts, read_all
from ..errors import DatasetError
from ..images import read_image
from .classes import IGNORE_LABEL, LabelClasses
from .folders import Pair, match_files
from .label_maps import read_label_map

__all__ = ["LabelAudit", "SetAudit", "audit_label_maps"]

_OTHER_COUNT = "number of images"
_FOLDERS = "folders unusable"
_NO_LABELS = "image without label map"
_NO_IMAGE = "label map without image"
_REPEATED = "several images or label maps of one name"
_BAD_IMAGE = "image unreadable"
_BAD_LABELS = "label map unusable"
_OTHER_SIZE = "sizes differ"


@dataclass
class SetAudit:
    """What was found in one set.

    Attributes:
        title: Name of the set.
        num_classes: Number of its classes.
        pairs: Number of images with a label map.
        expected: Number that it is published with, if known.
        pixels: (256,) number of pixels of every class; the last one counts those to ignore.
        problems: Kind, path and message of everything that is wrong.
        warning: Which classes never occur, if any.
    """

    title: str
    num_classes: int
    pairs: int = 0
    expected: int | None = None
    pixels: np.ndarray = field(default_factory=lambda: np.zeros(IGNORE_LABEL + 1, dtype=np.int64))
    problems: list[Problem] = field(default_factory=list)
    warning: str = ""

    @property
    def classes_seen(self) -> int:
        """Number of classes with at least one pixel."""
        return int(np.count_nonzero(self.pixels[: self.num_classes]))

    @property
    def ignored(self) -> float:
        """Part of the pixels that are to be ignored."""
        return float(self.pixels[IGNORE_LABEL] / max(self.pixels.sum(), 1))


@dataclass
class LabelAudit:
    """What was found in all sets."""

    sets: list[SetAudit] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """Whether nothing is wrong."""
        return not any(part.problems for part in self.sets)

    @property
    def warned(self) -> bool:
        """Whether a class never occurs."""
        return any(part.warning for part in self.sets)

    def summary(self, examples: int = 3) -> str:
        """A table of the sets, and of every kind of problem the first examples."""
        rows = [
            (
                part.title,
                part.pairs,
                "" if part.expected is None else part.expected,
                f"{part.classes_seen} of {part.num_classes}",
                f"{part.ignored:.1%}",
                len(part.problems),
            )
            for part in self.sets
        ]
        header = ["set", "images", "expected", "classes seen", "ignored pixels", "problems"]
        lines = [tabulate(rows, header, "github")]
        for part in self.sets:
            lines += list_problems(part.title, part.problems, examples)
            if part.warning:
                lines.append(f"\nWARNING for {part.title}: {part.warning}")
        return "\n".join(lines)

    def write_json(self, path: str | os.PathLike[str]) -> None:
        """Writes everything found."""
        content = []
        for part in self.sets:
            entry = asdict(part) | {"pixels": part.pixels[: part.num_classes].tolist(), "ignored": part.ignored}
            content.append(entry | {"problems": problems_as_dicts(part.problems)})
        with write_atomically(path, "w") as file:
            json.dump({"sets": content}, file, indent=1)


def audit_label_maps(
    images: str,
    labels: str,
    classes: LabelClasses,
    *,
    title: str = "label maps",
    expected: int | None = None,
    workers: int | None = None,
    progress: bool = True,
) -> SetAudit:
    """Reads every image and label map of two folders to the end and reports everything that is wrong.

    Args:
        images: Folder of images.
        labels: Folder of label maps.
        classes: What their values mean.
        title: What to call the set.
        expected: Number of images that there should be.
        workers: Files that are read at the same time; by default one per core.
        progress: Show a progress bar.
    """
    result = SetAudit(title, classes.num_classes, expected=expected)
    try:
        found = match_files(images, labels)
    except DatasetError as error:
        result.problems.append((_FOLDERS, str(images), str(error)))
        return result
    result.pairs = len(found.pairs)
    if expected is not None and result.pairs != expected:
        message = f"{images}: {result.pairs} images with a label map: expected {expected}"
        result.problems.append((_OTHER_COUNT, str(images), message))
    for kind, paths, advice in (
        (_NO_LABELS, found.without_labels, f"no label map of that name in {labels}"),
        (_NO_IMAGE, found.without_image, f"no image of that name in {images}"),
        (_REPEATED, found.repeated, "expected one image and one label map of each name"),
    ):
        result.problems += [(kind, path, f"{path}: {advice}") for path in paths]
    checked = read_all(lambda pair: _check(pair, classes), found.pairs, title=title, workers=workers, progress=progress)
    for pixels, problems in checked:
        result.pixels += pixels
        result.problems += problems
    result.warning = classes.absent(result.pixels)
    return result


def _check(pair: Pair, classes: LabelClasses) -> tuple[np.ndarray, list[Problem]]:
    """Pixels of every class, and what is wrong."""
    problems, image, labels = [], None, None
    try:
        image = read_image(pair.image)
    except UserError as error:
        problems.append((_BAD_IMAGE, pair.image, str(error)))
    try:
        labels = read_label_map(pair.labels, classes)
    except UserError as error:
        problems.append((_BAD_LABELS, pair.labels, str(error)))
    if image is not None and labels is not None and image.shape[:2] != labels.shape:
        sizes = [f"{height} x {width}" for height, width in (labels.shape, image.shape[:2])]
        message = f"{pair.labels}: {sizes[0]} (height x width), but its image is {sizes[1]} after EXIF rotation"
        problems.append((_OTHER_SIZE, pair.labels, message))
    values = np.zeros(0, dtype=np.uint8) if labels is None else labels.reshape(-1)
    return np.bincount(values, minlength=IGNORE_LABEL + 1), problems
