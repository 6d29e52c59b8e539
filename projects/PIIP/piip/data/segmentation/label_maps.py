"""Reading label maps: one channel of class numbers, checked when read."""

from __future__ import annotations

import numpy as np
from detectron2.utils.file_io import PathManager
from PIL import Image

from piip_core.images import image_size, opened_image, stored_values

from ..dataset import DatasetError
from .classes import IGNORE_LABEL, LabelClasses

__all__ = ["LABEL_ENDING", "check_label_header", "read_label_map"]

LABEL_ENDING = ".png"
_FORMAT = "PNG"
# 8 bits, a palette (its indices are the labels), 1 bit, and 16 bits
_MODES = ("L", "P", "1", "I", "I;16", "I;16L", "I;16B", "I;16N")


def check_label_header(path: str) -> tuple[int, int]:
    """Height and width of a label map after EXIF rotation, from its header alone.

    Raises:
        UnreadableImageError: If the file is missing, empty or no image.
        DatasetError: If it is no PNG file or has several channels.
    """
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
    return _to_classes(path, values, classes)


def _to_classes(path: str, values: np.ndarray, classes: LabelClasses) -> np.ndarray:
    first = 1 if classes.reduce_zero_label else 0
    # 0 is below the first class only where it stands for pixels to ignore
    outside = (values >= first + classes.num_classes) & (values != IGNORE_LABEL) | (values < 0)
    if outside.any():
        found, counts = np.unique(values[outside], return_counts=True)
        shown = ", ".join(f"{value} ({count} pixels)" for value, count in zip(found[:3], counts[:3], strict=True))
        more = f" and {len(found) - 3} more" if len(found) > 3 else ""
        raise DatasetError(
            f"{path}: label {shown}{more}: expected {classes.meaning}. Give all classes (data.classes), or correct the "
            "file"
        )
    labels = values.astype(np.uint8)
    if not classes.reduce_zero_label:
        return labels
    shifted = labels - np.uint8(1)  # 0 becomes 255
    shifted[labels == IGNORE_LABEL] = IGNORE_LABEL
    return shifted


def _check_kind(path: str, image: Image.Image) -> None:
    if image.format != _FORMAT:
        raise DatasetError(
            f"{path}: is a {image.format} file: expected {_FORMAT}, which keeps every label as it is (JPEG does not)"
        )
    if image.mode not in _MODES:
        raise DatasetError(
            f"{path}: an image of mode {image.mode} ({len(image.getbands())} channels): expected one channel (or a "
            "palette) of class numbers, not of colours"
        )
    if getattr(image, "n_frames", 1) > 1:
        raise DatasetError(f"{path}: is an animation of {image.n_frames} images: expected one image of class numbers")
