"""Checks of the annotations in a COCO-format file, before compiled code takes them on trust."""

from __future__ import annotations

import json
import logging
import math
import reprlib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pycocotools.mask as mask_util
from detectron2.utils.logger import log_first_n

from .dataset import DatasetError, first_few

_NUMBERS = {int, float}
_FLAGS = {None: 0, 0: 0, 1: 1, "0": 0, "1": 1}  # also False, True, 0.0 and 1.0, which are equal to 0 and 1
_FAR = 10**6  # pixels: single precision is too coarse beyond
_NO_SIZE = 2**-17  # of the longer side of the image: a narrower box is lost in the single precision of detections
_LARGEST_AREA = 1e10  # square pixels: pycocotools ignores larger objects, and those below 0
_REACH = 10  # sides of the image: what reaches further is no polygon of it, and its outline fills the memory
_ADVICE = "for boxes only, use a model without mask head and dataloader.train.mapper.use_instance_mask=False"


class Findings:
    """What was found in one file, by kind: what it cannot be used with, and what was mended or left out."""

    def __init__(self, path: str) -> None:
        self.path = path
        self._errors: dict[str, list[str]] = {}
        self._notes: dict[str, list[str]] = {}

    def error(self, kind: str, entry: str) -> None:
        """Adds an entry that cannot be used; `kind` says why and what was expected."""
        self._errors.setdefault(kind, []).append(entry)

    def note(self, kind: str, entry: str) -> None:
        """Adds an entry that was mended or left out; `kind` follows on a number."""
        self._notes.setdefault(kind, []).append(entry)

    def raise_errors(self) -> None:
        """Raises all errors, if there are any, as one DatasetError."""
        if self._errors:
            problems = (f"{len(found)} x {kind}: {first_few(found)}" for kind, found in self._errors.items())
            raise DatasetError(f"{self.path}: {'; '.join(problems)}. Correct these entries or remove them")

    def log_notes(self, logger: logging.Logger) -> None:
        """Logs all notes as one warning, once in a run that reads the file several times."""
        if self._notes:
            notes = (f"{len(found)} {kind}: {first_few(found)}" for kind, found in self._notes.items())
            log_first_n(logging.WARNING, f"{self.path}: {'; '.join(notes)}", key="message", name=logger.name)


def whole_number(value: Any) -> int | None:
    """An integer of 64 bits, also from 2.0 as spreadsheets write 2; None for anything else."""
    if type(value) is float and value.is_integer():
        value = int(value)
    return value if type(value) is int and -(2**63) <= value < 2**63 else None


def check_annotations(
    annotations: Sequence[dict[str, Any]],
    images: Mapping[int, Mapping[str, Any]],
    category_ids: Collection[int],
    found: Findings,
    *,
    training: bool,
    require_masks: bool,
) -> dict[int, list[dict[str, Any]]]:
    """Checks all annotations of a file, mends them in place, and leaves out what cannot be used.

    Every annotation that is returned has "image_id" and "category_id" of the file, an "id" of its own from 1 on, a
    "bbox" of four finite numbers, "iscrowd" 0 or 1, a number as "area", and if a "segmentation", one that pycocotools
    takes.

    Args:
        annotations: Objects of the file.
        images: Its checked images by id.
        category_ids: Ids of its categories.
        found: Takes errors and notes.
        training: Leave out the boxes that the published training does not use: no overlap with the image, a side below
            1 pixel, an area of 0. Otherwise, what no detection can match: no overlap, no size, a mask without a pixel.
        require_masks: Whether every object must have a mask (when training, crowds need none); otherwise, masks that
            are none are left out.

    Returns:
        The annotations by image id.

    Raises:
        DatasetError: If any cannot be used.
    """
    kept: dict[int, list[dict[str, Any]]] = {image_id: [] for image_id in images}
    check = _Check(images, category_ids, found, training, require_masks)
    for index, annotation in enumerate(annotations):
        if check.usable(annotation, index):
            kept[annotation["image_id"]].append(annotation)
        annotation["id"] = index + 1  # nothing asks for those of the file, and pycocotools cannot use all of them
    found.raise_errors()
    return kept


@dataclass
class _Check:
    """Checks and mends one annotation after the other; the arguments of `check_annotations`."""

    images: Mapping[int, Mapping[str, Any]]
    category_ids: Collection[int]
    found: Findings
    training: bool
    require_masks: bool

    def usable(self, annotation: dict[str, Any], index: int) -> bool:
        """Mends an annotation; False if it is to be left out, or an error was found."""
        name = _name(annotation, index)
        image = self._references(annotation, name)
        if not image or not self._box(annotation, name) or not self._flags(annotation, name):
            return False
        room = self._mask(annotation, name, image)
        self._area(annotation, name)
        return self._room(annotation, name, image) and room

    def _references(self, annotation: dict[str, Any], name: str) -> Mapping[str, Any] | None:
        """The image of an annotation, if its category exists as well."""
        for key, known, what in (
            ("image_id", self.images, "an image that is not in 'images'"),
            ("category_id", self.category_ids, "a category that is not in 'categories'"),
        ):
            value = annotation.get(key)
            number = whole_number(value)
            if number is None:
                kind = f"annotation without a valid '{key}' (expected int)"
                self.found.error(kind, f"{name} ({key}: {reprlib.repr(value)})")
                return None
            if number not in known:
                self.found.error(f"annotation of {what}", f"{name} ({key} {number})")
                return None
            annotation[key] = number
        return self.images[annotation["image_id"]]

    def _box(self, annotation: dict[str, Any], name: str) -> bool:
        box = annotation.get("bbox")
        good = isinstance(box, list) and len(box) == 4 and _NUMBERS.issuperset(map(type, box))
        # the comparison is false for NaN
        if good and all(-_FAR <= value <= _FAR for value in box):
            return True
        kind = f"annotation whose 'bbox' is not four finite numbers [x, y, width, height] from -{_FAR} to {_FAR}"
        self.found.error(kind, f"{name} (bbox {reprlib.repr(box)})")
        return False

    def _flags(self, annotation: dict[str, Any], name: str) -> bool:
        """Makes 'iscrowd' 0 or 1."""
        values = annotation.get("iscrowd"), annotation.get("ignore")
        try:
            annotation["iscrowd"], ignore = (_FLAGS[value] for value in values)
        except (KeyError, TypeError):  # another value, or a list
            found = f"{name} (iscrowd {reprlib.repr(values[0])}, ignore {reprlib.repr(values[1])})"
            self.found.error("annotation whose 'iscrowd' or 'ignore' is not 0 or 1", found)
            return False
        if ignore:
            self.found.error("annotation with 'ignore', which COCO's format does not have (set 'iscrowd')", name)
        return not ignore

    def _mask(self, annotation: dict[str, Any], name: str, image: Mapping[str, Any]) -> bool:
        """Whether the mask has room for a pixel, or none is needed."""
        mask, size = annotation.pop("segmentation", None), (image["height"], image["width"])
        if not mask and not (self.require_masks and not (self.training and annotation["iscrowd"])):
            return True
        try:
            if not mask:
                raise BadMaskError("missing or empty: expected polygons or a run-length encoding")
            annotation["segmentation"], note = check_mask(mask, *size)
        except BadMaskError as error:
            if self.require_masks:
                words = "without 'segmentation', needed for masks" if not mask else "whose 'segmentation' is no mask"
                self.found.error(f"annotation {words} ({_ADVICE})", f"{name} ({error})")
            else:
                self.found.note("masks are none and left out, their boxes stay", f"{name} ({error})")
            return True
        if note == "flat":
            self.found.note("masks are one list of numbers and taken for one polygon", name)
        elif note == "parts":
            self.found.note("masks have polygons of one or two points, which are left out", name)
        if not self.require_masks:
            return True
        empty = note == "empty"
        if not (self.training or empty):  # how it is evaluated; training rasters it at another size
            pixels = mask_area(annotation["segmentation"], *size)
            if annotation.get("area") is None:
                annotation["area"] = pixels
            empty = pixels == 0
        if empty:
            self.found.note("masks without a pixel in the image are dropped with their objects", name)
        return not empty

    def _area(self, annotation: dict[str, Any], name: str) -> None:
        area = annotation.get("area")
        if type(area) in _NUMBERS and 0 <= area <= _LARGEST_AREA:
            return
        if area is not None:
            kind = f"areas are no numbers from 0 to {_LARGEST_AREA:g} and taken from the boxes"
            self.found.note(kind, f"{name} (area {reprlib.repr(area)})")
        annotation["area"] = max(annotation["bbox"][2], 0) * max(annotation["bbox"][3], 0)

    def _room(self, annotation: dict[str, Any], name: str, image: Mapping[str, Any]) -> bool:
        """Whether the box is of use inside the image."""
        x, y, w, h = annotation["bbox"]
        height, width = image["height"], image["width"]
        usable = min(x + w, width) > max(x, 0) and min(y + h, height) > max(y, 0)
        if self.training:
            usable = usable and min(w, h) >= 1 and annotation["area"] > 0
        else:
            usable = usable and min(w, h) >= _NO_SIZE * max(height, width)
        kind = ""
        if not usable:
            kind = "boxes without usable area in the image are dropped"
        # Rounded annotations overshoot by parts of a pixel everywhere: not worth a word.
        elif x < -1 or y < -1 or x + w > width + 1 or y + h > height + 1:
            kind = "boxes reach out of the image" + (" and are clipped" if self.training else ", as no detection can")
        if kind:
            self.found.note(kind, f"{name} (bbox {annotation['bbox']}, {image['file_name']})")
        return usable


def _name(annotation: Mapping[str, Any], index: int) -> str:
    """By its id, or where an annotation that was converted comes from."""
    if isinstance(annotation.get("label_file"), str):
        return annotation["label_file"]
    value = annotation.get("id")
    return f"annotation {value if type(value) is int else f'number {index}'}"


class BadMaskError(ValueError):
    """A segmentation that is no mask of its image; the message says what was found and expected."""


def check_mask(mask: Any, height: int, width: int) -> tuple[list[list[float]] | dict[str, Any], str]:
    """A 'segmentation' in the form that pycocotools takes.

    It is polygons [[x, y, ...], ...], one polygon [x, y, ...], or a run-length encoding {"size", "counts"}.

    Returns:
        The mask, and what is to be said about it, if anything: "flat" for one polygon that was not in a list, "parts"
        if polygons of fewer than three points were left out, "empty" if no pixel of the image can be in it.

    Raises:
        BadMaskError: If it is no mask of this image.
    """
    if isinstance(mask, dict):
        return _check_runs(mask, height, width)
    if not isinstance(mask, list):
        raise BadMaskError(f"{reprlib.repr(mask)}: expected polygons or a run-length encoding")
    flat = not isinstance(mask[0], list)
    polygons = [mask] if flat else mask
    covers = [_covers(polygon, height, width) for polygon in polygons]
    kept = [polygon for polygon in polygons if len(polygon) >= 6]
    if not kept:
        raise BadMaskError(f"polygon {reprlib.repr(mask)}: expected x, y of at least three points")
    note = "parts" if len(kept) < len(polygons) else "flat" if flat else ""
    return kept, note if any(covers) else "empty"


def mask_area(mask: list[list[float]] | dict[str, Any], height: int, width: int) -> int:
    """Number of pixels in a mask that `check_mask` returned, as pycocotools counts them."""
    if isinstance(mask, list):
        return int(mask_util.area(mask_util.merge(mask_util.frPyObjects(mask, height, width))))
    return int(mask_util.area(compressed(mask)))


def compressed(mask: dict[str, Any]) -> dict[str, Any]:
    """A run-length encoding that `check_mask` returned, with its counts as a string, as Detectron2 takes them."""
    return mask_util.frPyObjects(mask, *mask["size"]) if isinstance(mask["counts"], list) else mask


def _covers(polygon: Any, height: int, width: int) -> bool:
    """Whether there is room inside the outline, and some of that in the image; an error if it is no outline."""
    if not isinstance(polygon, list):
        raise BadMaskError(f"{reprlib.repr(polygon)} among polygons: expected lists of numbers x, y, ...")
    if not _NUMBERS.issuperset(map(type, polygon)):
        other = next(value for value in polygon if type(value) not in _NUMBERS)
        raise BadMaskError(f"polygon with {json.dumps(other):.40}: expected numbers x, y, ...")
    if len(polygon) % 2:
        raise BadMaskError(f"polygon of {len(polygon)} numbers: expected pairs x, y")
    if not polygon:
        return False
    xs, ys, limit = polygon[::2], polygon[1::2], _REACH * max(height, width)
    left, top, right, bottom = min(xs), min(ys), max(xs), max(ys)
    inside = min(left, top) >= -limit and max(right, bottom) <= limit
    if not (inside and math.isfinite(sum(polygon))):  # the sum finds a NaN, which min and max may pass over
        far = next(value for value in polygon if not -limit <= value <= limit)
        raise BadMaskError(f"polygon with coordinate {reprlib.repr(far)}: expected -{limit} to {limit} for its image")
    return min(right, width) > max(left, 0) and min(bottom, height) > max(top, 0)


def _check_runs(mask: dict[str, Any], height: int, width: int) -> tuple[dict[str, Any], str]:
    size, counts = mask.get("size"), mask.get("counts")
    if size != [height, width]:
        expected = f"[height, width] = [{height}, {width}] of its image"
        raise BadMaskError(f"run-length encoding of size {reprlib.repr(size)}: expected {expected}")
    runs = _decode(counts) if isinstance(counts, str) else counts
    if not isinstance(runs, list) or not {int}.issuperset(map(type, runs)) or (runs and min(runs) < 0):
        raise BadMaskError(f"run-length encoding with counts {reprlib.repr(counts)}: expected lengths of runs")
    if sum(runs) != height * width:
        raise BadMaskError(
            f"run-length encoding whose counts add up to {sum(runs)}: expected height * width = {height * width} "
            "(lengths of runs, background first, down the columns)"
        )
    # The size may have been written as 80.0, which pycocotools refuses
    return {"size": [height, width], "counts": counts}, "" if any(runs[1::2]) else "empty"


def _decode(text: str) -> list[int] | None:
    """Lengths of runs from COCO's string of them, or None if it is none.

    A number is written in characters of 5 bits, the lowest first, where bit 5 says that another one follows and bit 4
    of the last one is the sign. From the fourth on it is the difference to the last but one.
    """
    codes = np.frombuffer(text.encode("utf-8"), dtype=np.uint8).astype(np.int64) - 48
    if not len(codes) or codes.min() < 0 or codes.max() > 63 or codes[-1] & 32:
        return None
    ends = np.flatnonzero(codes & 32 == 0)
    starts = np.concatenate([[0], ends[:-1] + 1])
    lengths = ends - starts + 1
    if lengths.max() > 7:  # 32 bits
        return None
    shifts = 5 * (np.arange(len(codes)) - np.repeat(starts, lengths))
    values = np.add.reduceat((codes & 31) << shifts, starts)
    values -= np.where(codes[ends] & 16, 1 << (5 * lengths), 0)
    values[1::2] = np.cumsum(values[1::2])
    values[2::2] = np.cumsum(values[2::2])
    return values.tolist()
