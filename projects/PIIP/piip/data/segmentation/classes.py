"""Classes of label maps: what they are called, and which value in a file stands for which."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from detectron2.data.datasets.builtin_meta import ADE20K_SEM_SEG_CATEGORIES

from ..dataset import Category, DatasetError, first_few

__all__ = ["IGNORE_LABEL", "LabelClasses", "label_classes"]

IGNORE_LABEL = 255
"""Pixels of this label are neither trained on nor evaluated."""

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
            raise DatasetError(
                f"{len(self.names)} classes: expected 1 to {IGNORE_LABEL} (label {IGNORE_LABEL} stands for pixels to "
                "ignore)"
            )
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
        first = 1 if self.reduce_zero_label else 0
        return tuple(Category(first + k, name) for k, name in enumerate(self.names))

    @property
    def meaning(self) -> str:
        """The values that a file may hold, in words."""
        if self.reduce_zero_label:
            return f"1 to {self.num_classes} for the classes, 0 or {IGNORE_LABEL} to ignore (reduce_zero_label)"
        return f"0 to {self.num_classes - 1} for the classes, {IGNORE_LABEL} to ignore"

    def absent(self, pixels: np.ndarray) -> str:
        """Which classes have no pixel, in words; an empty string if all have.

        Args:
            pixels: Number of pixels of every class (num_classes and more,), the last one those to ignore.
        """
        seen = pixels[: self.num_classes] > 0
        if seen.all():
            return ""
        absent = [repr(name) for name, found in zip(self.names, seen, strict=True) if not found]
        what = f"class {absent[0]} occurs" if len(absent) == 1 else f"{len(absent)} of {len(seen)} classes occur"
        which = "" if len(absent) == 1 else f": {first_few(absent)}"
        hint = f"; {IGNORE_LABEL} = ignored: masks of 0 and {IGNORE_LABEL}? Write 1 instead of {IGNORE_LABEL}"
        return f"{what} in no label map{which}{hint if pixels[-1] and seen.sum() <= 1 else ''}"


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
            lines = [line.strip() for line in file.read().rstrip().splitlines()]
    except UnicodeDecodeError as error:
        raise DatasetError(f"{path}: not a text file in UTF-8 ({error}): {_EXPECTED}") from error
    try:
        return LabelClasses(tuple(lines)).names
    except DatasetError as error:
        raise DatasetError(f"{path}: {error}") from error
