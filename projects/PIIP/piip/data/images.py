"""Reading image files, with errors that name the file."""

from __future__ import annotations

import os

import numpy as np
from detectron2.data import detection_utils
from detectron2.utils.file_io import PathManager
from PIL import ExifTags, Image

from piip_core.errors import UserError

__all__ = ["UnreadableImageError", "check_image_mode", "read_image", "read_image_size", "unreadable"]

# Converting these to RGB would clip the values to 255 without a word.
_DEEP_MODES = ("I", "F", "I;16", "I;16L", "I;16B", "I;16N")
_TURNED = (5, 6, 7, 8)  # EXIF orientations that swap the sides


class UnreadableImageError(UserError):
    """An image file is missing, empty, truncated or not an 8-bit image; the message names it."""


def check_image_mode(path: str) -> None:
    """Reads only the header of an image file.

    Raises:
        UnreadableImageError: If it is not an image, or holds more than 8 bits per channel.
    """
    read_image_size(path)


def read_image_size(path: str) -> tuple[int, int]:
    """Reads only the header of an image file.

    Returns:
        Height and width, after EXIF rotation.

    Raises:
        UnreadableImageError: If it is not an image, or holds more than 8 bits per channel.
    """
    try:
        with PathManager.open(path, "rb") as file, Image.open(file) as image:
            mode = image.mode
            turned = image.getexif().get(ExifTags.Base.Orientation) in _TURNED
            size = image.size if turned else image.size[::-1]
    except Exception as error:
        raise unreadable(path, error) from error
    if mode in _DEEP_MODES:
        raise UnreadableImageError(
            f"{path}: image mode {mode} has more than 8 bits per channel: expected 8-bit grey, RGB or CMYK; convert it"
        )
    return size


def read_image(path: str, image_format: str = "RGB") -> np.ndarray:
    """Reads an image file as Detectron2 does (EXIF rotation applied), or says what is wrong with the file.

    Args:
        path: Image file.
        image_format: "RGB" or "BGR".

    Returns:
        (H, W, 3) uint8.

    Raises:
        UnreadableImageError: If the file is missing, empty, truncated, no image, or not 8 bits per channel.
    """
    check_image_mode(path)
    try:
        return detection_utils.read_image(path, format=image_format)
    except Exception as error:  # Pillow raises OSError, SyntaxError, ValueError, zlib and struct errors
        raise unreadable(path, error) from error


def unreadable(path: str, error: Exception) -> UnreadableImageError:
    """The exception that says why a file could not be read, given the one that reading it raised."""
    if not os.path.exists(path):
        reason = "no such file"
    elif os.path.isdir(path):
        reason = "is a folder"
    elif os.path.getsize(path) == 0:
        reason = "the file is empty (0 bytes)"
    else:
        reason = f"cannot be decoded ({type(error).__name__}: {error})"
    return UnreadableImageError(f"{path}: {reason}: expected a complete JPEG, PNG or other image file")
