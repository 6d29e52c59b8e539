"""Image files as a viewer shows them: which are read, how they are turned, and how deep they are."""

from __future__ import annotations

import os
import re
import unicodedata
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import IO, Any, BinaryIO

import numpy as np
from PIL import ExifTags, Image
from PIL.PngImagePlugin import PngImageFile

from .errors import UserError

# Pillow's readers of these start a program (EPS), or know the kind of the file and nothing else
_LEFT_OUT = {"EPS", "BUFR", "GRIB", "HDF5", "MPEG", "WMF"}
_BITS_PER_SAMPLE, _PLANAR, _SAMPLE_FORMAT, _WIDTH, _HEIGHT = 258, 284, 339, 256, 257  # TIFF's tags
_UNSIGNED = {1, 4}
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class UnreadableImageError(UserError):
    """An image file is missing, empty, truncated or not an 8-bit image; the message names it."""


class ImageTooLargeError(UserError):
    """An image has more pixels than Pillow's limit allows; the message names file, size and limit."""


@cache
def image_formats() -> tuple[str, ...]:
    """Names of the formats that are read."""
    Image.init()
    return tuple(name for name in Image.OPEN if name not in _LEFT_OUT)


@cache
def image_endings() -> tuple[str, ...]:
    """Endings of files of these formats, in lower case and with the dot."""
    formats = {*image_formats(), "MPO"}  # which the reader of JPEG opens
    return tuple(sorted(ending for ending, name in Image.registered_extensions().items() if name in formats))


@contextmanager
def opened_image(path: str | os.PathLike[str], open_file: Callable[..., BinaryIO] = open) -> Iterator[Image.Image]:
    """Opens an image file by its content, whatever its name ends in.

    Raises:
        UnreadableImageError: If it is no image, or anything goes wrong with it in the block; the message names it.
        ImageTooLargeError: If it has more pixels than twice `PIL.Image.MAX_IMAGE_PIXELS`.
    """
    try:
        with open_file(path, "rb") as file, Image.open(file, formats=image_formats()) as image:
            yield image
    except (UserError, MemoryError):
        raise
    except Image.DecompressionBombError as error:
        raise ImageTooLargeError(
            f"{path}: {error} Make the image smaller or cut it up; if you trust it, PIL.Image.MAX_IMAGE_PIXELS = None "
            "(in a configuration file of Python, at its top) lifts the limit"
        ) from error
    except Exception as error:  # Pillow raises OSError, SyntaxError, ValueError, zlib and struct errors
        raise UnreadableImageError(
            f"{path}: {_reason(path, error)}: expected a complete JPEG, PNG or other image file"
        ) from error


def read_image(path: str | os.PathLike[str], open_file: Callable[..., BinaryIO] = open) -> np.ndarray:
    """Reads an image file: turned as its orientation tag says, transparency dropped, of several frames the first.

    Returns:
        (H, W, 3) uint8, RGB.

    Raises:
        UnreadableImageError: If the file is missing, empty, truncated, no image, or not 8 bits per channel.
        ImageTooLargeError: As `opened_image`.
    """
    with opened_image(path, open_file) as image:
        check_values(path, image)
        return np.asarray(plain_rgb(upright(image)))


def image_size(image: Image.Image) -> tuple[int, int]:
    """Height and width after orientation of an opened image; nothing but its header is read."""
    if isinstance(image, PngImageFile) and image.fp and _says_more_at_its_end(image.fp):
        image.load()
    # Some versions of Pillow turn the size of a TIFF file when they open it, others when they load it
    tags = getattr(image, "tag_v2", None)
    width, height = (tags[_WIDTH], tags[_HEIGHT]) if tags else image.size
    return (width, height) if _orientation(image) in (5, 6, 7, 8) else (height, width)


def upright(image: Image.Image) -> Image.Image:
    """The pixels of an image, in its own mode, turned as its orientation tag says."""
    image.load()  # turns TIFF files, and takes their tag away
    turn = _TURNS.get(_orientation(image))
    return image if turn is None else image.transpose(turn)


def plain_rgb(image: Image.Image) -> Image.Image:
    """An image as RGB, transparency dropped."""
    return (image.convert("LA") if image.mode == "La" else image).convert("RGB")  # no direct way for premultiplied


def check_values(path: str | os.PathLike[str], image: Image.Image) -> None:
    """Checks that the values of an opened image that is not loaded yet are 0 to 255.

    By what the file holds: Pillow reads 16 bits of colour as 8 without a word.

    Raises:
        UnreadableImageError: If they are not.
    """
    reason = misread_values(image)
    bits = max(getattr(image, "tag_v2", {}).get(_BITS_PER_SAMPLE, (8,)))
    deep = bits > 8 or image.mode in ("I", "F") or image.mode.startswith("I;16")
    for codec, mode, *details in _layout(image):
        deep = deep or (codec.startswith("ppm") and details[0] > 255) or re.search(r";16[BLN]", str(mode)) is not None
    if reason or deep:
        reason = reason or f"image mode {image.mode} from a file with more than 8 bits per channel"
        raise UnreadableImageError(f"{path}: {reason}: expected 8-bit grey, RGB or CMYK; convert it")


def misread_values(image: Image.Image) -> str | None:
    """Why Pillow gives wrong numbers for an opened image, or None if it does not."""
    tags = getattr(image, "tag_v2", {})
    if not set(tags.get(_SAMPLE_FORMAT, (1,))) <= _UNSIGNED and image.mode not in ("I", "F"):
        return "signed values"
    if tags.get(_PLANAR) == 2 and max(tags.get(_BITS_PER_SAMPLE, (8,))) > 8:
        return "more than 8 bits per channel, and a plane for each channel"
    return None


def stored_values(image: Image.Image) -> np.ndarray:
    """The numbers of an opened image of one channel that is not loaded yet, as they are in the file.

    Grey of 2 and 4 bits is not spread over 0 to 255, and palettes give their indices.

    Returns:
        (H, W), turned as the orientation tag says; bool for 1 bit.
    """
    steps = {"L;2": 85, "L;4": 17}
    step = max((steps.get(str(mode), 1) for _, mode, *_ in _layout(image)), default=1)
    values = np.asarray(upright(image))
    return values // step if step > 1 else values


def spellings(name: str) -> list[str]:
    """Other ways to write a file name that look like it: back-slashes as slashes, accents composed or apart."""
    texts = (name, name.replace("\\", "/"))
    found = dict.fromkeys([*texts, *(unicodedata.normalize(form, text) for text in texts for form in ("NFC", "NFD"))])
    return [text for text in found if text != name]


def _layout(image: Image.Image) -> list[tuple[Any, ...]]:
    """How an opened image that is not loaded yet lies in its file: decoder, mode, and what else the decoder is told.

    `tile` is documented for those who write readers; what stands in it is not. Seen working with Pillow 10.3 to 12.3.
    """
    tiles = getattr(image, "tile", ())
    return [(tile[0], *(tile[3] if isinstance(tile[3], tuple) else (tile[3],))) for tile in tiles if tile[3]]


def _orientation(image: Image.Image) -> int:
    """The orientation tag; 1 if there is none, or it cannot be read."""
    try:
        # The method of the base class: that for PNG decodes the pixels
        return Image.Image.getexif(image).get(ExifTags.Base.Orientation, 1)
    except Exception:  # as many kinds as there are damaged tags; the pixels may be good
        return 1


def _says_more_at_its_end(file: IO[bytes]) -> bool:
    """Whether a PNG file that is not loaded yet has tags or text after its pixels, where ExifTool writes them."""
    here, pixels_seen, found = file.tell(), False, False
    file.seek(8)
    while not found and len(head := file.read(8)) == 8:
        kind = head[4:]
        pixels_seen = pixels_seen or kind == b"IDAT"
        found = pixels_seen and kind in (b"eXIf", b"iTXt", b"zTXt", b"tEXt")
        file.seek(int.from_bytes(head[:4], "big") + 4, os.SEEK_CUR)
    file.seek(here)
    return found


def _reason(path: str | os.PathLike[str], error: Exception) -> str:
    if not os.path.exists(path):
        return "no such file"
    if os.path.isdir(path):
        return "is a folder"
    if os.path.getsize(path) == 0:
        return "the file is empty (0 bytes)"
    return f"cannot be decoded ({type(error).__name__}: {error})"
