"""Reading image files, with errors that name the file."""

from __future__ import annotations

import numpy as np
from detectron2.utils.file_io import PathManager

from piip_core import images
from piip_core.images import UnreadableImageError, image_size, opened_image

__all__ = ["UnreadableImageError", "read_image", "read_image_size"]


def read_image_size(path: str) -> tuple[int, int]:
    """Height and width of an image after EXIF rotation, from its header alone; errors as in `read_image`."""
    with opened_image(path, PathManager.open) as image:
        images.check_values(path, image)
        return image_size(image)


def read_image(path: str, image_format: str = "RGB") -> np.ndarray:
    """`piip_core.images.read_image` in Detectron2's order of channels: (H, W, 3) uint8, "RGB" or "BGR"."""
    pixels = images.read_image(path, PathManager.open)
    return pixels[:, :, ::-1] if image_format == "BGR" else pixels
