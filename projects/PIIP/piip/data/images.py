"""Reading image files, with errors that name the file."""

from __future__ import annotations

import numpy as np
from detectron2.utils.file_io import PathManager

from piip_core import images
from piip_core.images import UnreadableImageError, image_size, opened_image

__all__ = ["UnreadableImageError", "read_image", "read_image_size"]


def read_image_size(path: str) -> tuple[int, int]:
    """Reads only the header of an image file.

    Returns:
        Height and width, after EXIF rotation.

    Raises:
        UnreadableImageError: If it is not an image, or holds more than 8 bits per channel.
        ImageTooLargeError: If it has more pixels than Pillow's limit.
    """
    with opened_image(path, PathManager.open) as image:
        images.check_values(path, image)
        return image_size(image)


def read_image(path: str, image_format: str = "RGB") -> np.ndarray:
    """Reads an image file as `piip_core.images.read_image`, in Detectron2's order of channels.

    Args:
        path: Image file.
        image_format: "RGB" or "BGR".

    Returns:
        (H, W, 3) uint8.

    Raises:
        UnreadableImageError: If the file is missing, empty, truncated, no image, or not 8 bits per channel.
        ImageTooLargeError: If it has more pixels than Pillow's limit.
    """
    pixels = images.read_image(path, PathManager.open)
    return pixels[:, :, ::-1] if image_format == "BGR" else pixels
