"""Label maps: one channel of class numbers, checked when read, and what its values stand for."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from detectron2.data.datasets.builtin_meta import ADE20K_SEM_SEG_CATEGORIES
from detectron2.utils.file_io import PathManager
from PIL import Image

from piip_core.images import image_size, opened_image, stored_values

from .dataset import Category, DatasetError, first_few

IGNORE_LABEL = 255
"""Pixels of this label are neither trained on nor evaluated."""

LABEL_ENDING = ".png"

# 8 bits, a palette (its indices are the labels), 1 bit, and 16 bits
_MODES = ("L", "P", "1", "I", "I;16", "I;16L", "I;16B", "I;16N")
_EXPECTED = (
    "expected 'ade20k', the path of a text file with one class name per line, a list of names, or the number of classes"
)


@dataclass(frozen=True)
class LabelClasses:
    """The classes of label maps; 255 always stands for pixels to ignore.

    Attributes:
        names: Name of class k of the model at index k.
        reduce_zero_label: In the files, 0 stands for pixels to ignore as well and class k has the value k + 1, as in
            ADE20K's. Otherwise class k has the value k.
    """

    names: tuple[str, ...]
    reduce_zero_label: bool = False

    def __post_init__(self) -> None:
        if not 1 <= len(self.names) <= IGNORE_LABEL:
            reason = f"label {IGNORE_LABEL} stands for pixels to ignore"
            raise DatasetError(f"{len(self.names)} classes: expected 1 to {IGNORE_LABEL} ({reason})")
        repeated = [name for name, count in Counter(self.names).items() if count > 1]
        if repeated:
            raise DatasetError(f"class names used more than once: {repeated[:3]}: expected different names")
        if not all(self.names):
            raise DatasetError(f"class {self.names.index('')} has an empty name: expected a name for each class")

    @property
    def num_classes(self) -> int:
        """Number of classes, without the ignored pixels."""
        return len(self.names)

    @property
    def categories(self) -> tuple[Category, ...]:
        """Value in the files and name of every class."""
        return tuple(Category(k, name) for k, name in enumerate(self.names, start=int(self.reduce_zero_label)))

    @property
    def meaning(self) -> str:
        """The values that a file may hold, in words."""
        if self.reduce_zero_label:
            return f"1 to {self.num_classes} for the classes, 0 or {IGNORE_LABEL} to ignore (reduce_zero_label)"
        return f"0 to {self.num_classes - 1} for the classes, {IGNORE_LABEL} to ignore"

    def absent(self, pixels: np.ndarray) -> str:
        """Which classes have none of the `pixels` (num_classes and more,), whose last number is of those to ignore.

        In words; an empty string if all have some.
        """
        absent = [repr(name) for name, count in zip(self.names, pixels, strict=False) if not count]
        if not absent:
            return ""
        what = f"{len(absent)} of {len(self.names)} classes occur in no label map: {first_few(absent)}"
        if len(absent) == 1:
            what = f"class {absent[0]} occurs in no label map"
        hint = f"; {IGNORE_LABEL} = ignored: masks of 0 and {IGNORE_LABEL}? Write 1 instead of {IGNORE_LABEL}"
        return what + (hint if pixels[-1] and len(self.names) - len(absent) <= 1 else "")


def label_classes(classes: str | int | Sequence[str], reduce_zero_label: bool | None = None) -> LabelClasses:
    """Classes as a configuration names them.

    Args:
        classes: "ade20k" for its 150 classes; a text file with one name per line; the names; or their number.
        reduce_zero_label: See `LabelClasses`; None for what the data set's own files have: True for "ade20k", False for
            all others.

    Raises:
        DatasetError: If the names cannot be used.
    """
    if classes == "ade20k":
        names = tuple(name.strip() for name in ADE20K_SEM_SEG_CATEGORIES)
    elif isinstance(classes, str):
        names = _read_names(classes)
    elif isinstance(classes, Sequence):
        names = tuple(str(name) for name in classes)
    elif isinstance(classes, int) and not isinstance(classes, bool):
        names = tuple(f"class {k}" for k in range(classes))
    else:
        raise DatasetError(f"data.classes={classes!r}: {_EXPECTED}")
    return LabelClasses(names, classes == "ade20k" if reduce_zero_label is None else bool(reduce_zero_label))


def _read_names(path: str) -> tuple[str, ...]:
    if not os.path.isfile(path):
        raise DatasetError(f"data.classes={path}: no such file (looked from {os.getcwd()}): {_EXPECTED}")
    try:
        with open(path, encoding="utf-8-sig") as file:
            return LabelClasses(tuple(line.strip() for line in file.read().rstrip().splitlines())).names
    except UnicodeDecodeError as error:
        raise DatasetError(f"{path}: not a text file in UTF-8 ({error}): {_EXPECTED}") from error
    except DatasetError as error:
        raise DatasetError(f"{path}: {error}") from error


def read_label_size(path: str) -> tuple[int, int]:
    """Height and width of a label map after EXIF rotation, from its header alone; errors as in `read_label_map`."""
    with opened_image(path, PathManager.open) as image:
        _check_kind(path, image)
        return image_size(image)


def read_label_map(path: str, classes: LabelClasses) -> np.ndarray:
    """Reads a label map, and turns its values into the model's classes: (H, W) uint8, 255 for pixels to ignore.

    The file is a PNG of one channel: 1 to 16 bits, or a palette, whose indices count. EXIF rotation is applied.

    Raises:
        UnreadableImageError: If the file is missing, empty, truncated or no image.
        DatasetError: If it is no PNG file, has several channels, or holds a value that stands for nothing.
    """
    with opened_image(path, PathManager.open) as image:
        _check_kind(path, image)
        values = stored_values(image)
    first = int(classes.reduce_zero_label)
    # 0 is below the first class only where it stands for pixels to ignore
    outside = (values >= first + classes.num_classes) & (values != IGNORE_LABEL) | (values < 0)
    if outside.any():
        counts = Counter(values[outside].tolist())
        found = [f"{value} ({counts[value]} pixels)" for value in sorted(counts)]
        raise DatasetError(
            f"{path}: label {first_few(found)}: expected {classes.meaning}. Give all classes (data.classes), or "
            "correct the file"
        )
    labels = values.astype(np.uint8)
    return np.where(labels == IGNORE_LABEL, labels, labels - np.uint8(first))  # 0 - 1 is 255


def _check_kind(path: str, image: Image.Image) -> None:
    if image.format != "PNG":
        raise DatasetError(
            f"{path}: is a {image.format} file: expected PNG, which keeps every label as it is (JPEG does not)"
        )
    if image.mode not in _MODES:
        raise DatasetError(
            f"{path}: an image of mode {image.mode} ({len(image.getbands())} channels): expected one channel (or a "
            "palette) of class numbers, not of colours"
        )
    if getattr(image, "n_frames", 1) > 1:
        raise DatasetError(f"{path}: is an animation of {image.n_frames} images: expected one image of class numbers")
