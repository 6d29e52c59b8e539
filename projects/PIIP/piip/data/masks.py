"""Masks of COCO-format files: whether they are what the format says, before compiled code takes them on trust."""

from __future__ import annotations

import json
import math
import reprlib
from typing import Any

import numpy as np
import pycocotools.mask as mask_util

_NUMBERS = {int, float}
_FAR = 10  # sides of the image: what reaches further is no polygon of it, and its outline fills the memory


class BadMaskError(ValueError):
    """A segmentation that is no mask of its image; the message says what was found and expected."""


def check_mask(mask: Any, height: int, width: int) -> tuple[list[list[float]] | dict[str, Any], str]:
    """A 'segmentation' in the form that pycocotools takes.

    Args:
        mask: Polygons [[x, y, ...], ...], one polygon [x, y, ...], or a run-length encoding {"size", "counts"}.
        height: Of its image, in pixels.
        width: Of its image, in pixels.

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
    xs, ys, limit = polygon[::2], polygon[1::2], _FAR * max(height, width)
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
