"""From images to the pixel tensors of the vision tower."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar, TypedDict

import numpy as np
import torch
from PIL import Image
from transformers import BaseImageProcessor, BatchFeature, TensorType

from piip_core.errors import ConfigError, UserError, check
from piip_core.images import misread_values, plain_rgb

# Modes in which padding before the conversion makes a difference; at gray images the public code stops there
_OWN_COLOURS = ("P", "CMYK")
_NAMES_OF_CLASSES = ("processor_class", "image_processor_type")  # in files, beside the settings


class ImageError(UserError):
    """Something that is no image, or one that cannot be used; the message says which and what to give instead."""


class PIIPImageProcessorKwargs(TypedDict, total=False):
    """Settings of `PIIPImageProcessor`, for its constructor and for a single call."""

    size: int | dict[str, int] | None
    pad_to_square: bool | None
    background_color: Sequence[int] | None
    convert_before_padding: bool | None
    max_pixels: int | None
    size_multiple: int | None
    image_mean: Sequence[float] | None
    image_std: Sequence[float] | None
    return_tensors: str | TensorType | None


class PIIPImageProcessor(BaseImageProcessor):
    """Makes every image a square of the size of the last branch's, as the published models were trained.

    Pad to a square, or not; resize the short side (bicubic); crop the centre; scale to [0, 1]; subtract the mean and
    divide by the standard deviation of ImageNet (also for CLIP branches). With `max_pixels` images keep their aspect
    ratio instead: see `fitted_size`.

    Images may be PIL images, uint8 numpy arrays (H, W, C), uint8 torch tensors (C, H, W), arrays in the other order
    where it is clear, gray ones without the axis C, batches with a leading axis, or lists of all these. They become RGB
    first: transparency is dropped and not blended, the first frame stands for an animation, an orientation tag is
    ignored (but Pillow itself follows that of TIFF files).

    Args:
        size: Side of the result in pixels, an int or {"height": S, "width": S}.
        pad_to_square: Pad the short side with `background_color` (second training stage, evaluation). False leaves
            what does not fit into the square out (first training stage).
        background_color: RGB of the padding.
        convert_before_padding: False pads palette and CMYK images before they become RGB, which spoils their colours.
            The published results on ScienceQA and MMBench were made that way.
        max_pixels: Most pixels of an image at its own aspect ratio, `PIIPVisionConfig.max_pixels`; None for squares.
        size_multiple: What its sides are a multiple of, `PIIPLlavaConfig.size_multiple`.
        image_mean: Per channel, RGB, of values in [0, 1].
        image_std: Per channel, RGB, of values in [0, 1].

    Raises:
        ConfigError: For an unknown setting or a value that cannot work.
        ImageError: When called with something that is no usable image.
    """

    valid_kwargs = PIIPImageProcessorKwargs

    size: ClassVar = {"height": 512, "width": 512}
    pad_to_square = True
    background_color = (123, 116, 103)  # ImageNet's mean, rounded down
    convert_before_padding = True
    max_pixels = None
    size_multiple = 32
    image_mean = (0.485, 0.456, 0.406)
    image_std = (0.229, 0.224, 0.225)
    return_tensors = None

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**self._settings({n: value for n, value in kwargs.items() if n not in _NAMES_OF_CLASSES}))

    @property
    def image_size(self) -> int:
        """Side of the result in pixels."""
        return self.size["height"]

    def _settings(self, given: dict[str, Any]) -> dict[str, Any]:
        """All settings, those that are not given as the processor has them."""
        names = self.valid_kwargs.__annotations__
        if unknown := sorted(set(given) - set(names)):
            raise ConfigError(f"{', '.join(unknown)}: no such setting of images; known: {', '.join(names)}")
        settings = {name: getattr(self, name) if given.get(name) is None else given[name] for name in names}
        settings["size"] = _square(settings["size"])
        multiple, most = settings["size_multiple"], settings["max_pixels"]
        check(isinstance(multiple, int) and multiple > 0, "size_multiple", multiple, "a positive number of pixels")
        fits = most is None or (isinstance(most, int) and most >= multiple**2)
        check(fits, "max_pixels", most, f"None, or {multiple**2} or more, the square of size_multiple")
        for name in ("pad_to_square", "convert_before_padding"):
            check(settings[name] in (True, False), name, settings[name], "True or False")
        for name in ("background_color", "image_mean", "image_std"):
            value = settings[name]
            right = isinstance(value, (list, tuple)) and len(value) == 3
            check(right, name, value, "3 numbers, red first")
            settings[name] = tuple(value)
        return settings

    def preprocess(self, images: Any, **kwargs: Any) -> BatchFeature:
        """Pixel values of images; a call of the processor is the same.

        Args:
            images: See the class.
            **kwargs: Settings for this call; `return_tensors="pt"` for a tensor instead of an array.

        Returns:
            `pixel_values` (N, 3, size, size), float32. With `max_pixels` (N, 3, H, W), images padded with zeros at the
            bottom and right to the largest of them, and `image_sizes` (N, 2), their heights and widths without it.

        Raises:
            ConfigError: For an unknown setting or a value that cannot work.
            ImageError: For something that is no usable image.
        """
        settings = self._settings(kwargs)
        return_tensors = settings.pop("return_tensors")
        pixels = []
        for index, item in enumerate(_flat(images)):
            try:
                pixels.append(self._pixels(_as_pillow(item), **settings))
            except ImageError as error:
                raise ImageError(f"image {index}: {error}") from error.__cause__
        if not pixels:
            raise ImageError("no images were given: expected at least one")
        data = {"pixel_values": np.stack(pixels)} if settings["max_pixels"] is None else _padded_batch(pixels)
        return BatchFeature(data=data, tensor_type=return_tensors)

    def _pixels(
        self,
        image: Image.Image,
        *,
        size: dict[str, int],
        pad_to_square: bool,
        background_color: tuple[int, int, int],
        convert_before_padding: bool,
        max_pixels: int | None,
        size_multiple: int,
        image_mean: tuple[float, float, float],
        image_std: tuple[float, float, float],
    ) -> np.ndarray:
        """Pixel values (3, H, W) of one image."""
        if convert_before_padding or image.mode not in _OWN_COLOURS:
            image = rgb_image(image)
        if max_pixels is not None:
            image = rgb_image(image)
            image = image.resize(fitted_size(image.size, max_pixels, size_multiple), Image.Resampling.BICUBIC)
        else:
            if pad_to_square:
                image = _padded(image, background_color)
            image = _centre(rgb_image(image), size["height"])
        # In place and in single precision: several times faster than the library's steps
        pixels = np.moveaxis(np.asarray(image), -1, 0).astype(np.float32, order="C")
        mean, std = (255 * np.array(values, np.float32)[:, None, None] for values in (image_mean, image_std))
        pixels -= mean
        pixels /= std
        return pixels


def fitted_size(size: tuple[int, int], max_pixels: int, multiple: int) -> tuple[int, int]:
    """The size nearest that of an image, with its aspect ratio, of at most so many pixels; sides are whole multiples.

    An image within the budget is not enlarged, but for a side shorter than the multiple.
    """
    scale, most = min(1.0, math.sqrt(max_pixels / (size[0] * size[1]))) / multiple, max_pixels // multiple**2
    cells = [max(round(side * scale), 1) for side in size]
    if math.prod(cells) > most:
        cells = [min(max(int(side * scale), 1), most) for side in size]
    return cells[0] * multiple, cells[1] * multiple


def _padded_batch(pixels: Sequence[np.ndarray]) -> dict[str, np.ndarray]:
    """Images (3, H, W) of several sizes in one array, and their sizes."""
    sizes = np.array([image.shape[1:] for image in pixels])
    batch = np.zeros((len(pixels), 3, *sizes.max(axis=0)), np.float32)
    for place, image, (height, width) in zip(batch, pixels, sizes, strict=True):
        place[:, :height, :width] = image
    return {"pixel_values": batch, "image_sizes": sizes}


def rgb_image(image: Image.Image) -> Image.Image:
    """An image as 8-bit RGB: transparency dropped, first frame, orientation tag ignored, 16-bit gray scaled.

    Raises:
        ImageError: If the file of the image is broken, or its mode says nothing of the range of its values.
    """
    if image.mode in ("I", "F"):
        raise ImageError(
            f"an image of mode {image.mode!r} (32 bits per pixel) has no known range of values: "
            "scale it to 8 bits and convert it to mode 'L' or 'RGB' first"
        )
    if reason := misread_values(image):
        raise ImageError(f"an image file with {reason}, which is not read correctly: convert it to 8 bits first")
    _load(image)
    if image.mode.startswith("I;16"):
        image = Image.fromarray((np.asarray(image) // 257).astype(np.uint8))
    return plain_rgb(image)


def _load(image: Image.Image) -> None:
    """Decodes the file of an image, which opening it does not do."""
    try:
        image.load()
    except (OSError, SyntaxError, ValueError) as error:
        name = getattr(image, "filename", "") or "its file"
        raise ImageError(f"{name} cannot be read ({error}): replace it or leave it out") from error


def _square(size: Any) -> dict[str, int]:
    side = size["height"] if isinstance(size, dict) and set(size) == {"height", "width"} else size
    right = isinstance(side, int) and side > 0 and size in (side, {"height": side, "width": side})
    check(right, "size", size, "the side of the last branch's image, an int or {'height': S, 'width': S}")
    return {"height": side, "width": side}


def _flat(images: Any) -> Iterator[Any]:
    """Single images out of an image, a batch, or nested lists of them."""
    if isinstance(images, (list, tuple)):
        for item in images:
            yield from _flat(item)
    elif isinstance(images, (np.ndarray, torch.Tensor)) and images.ndim == 4:
        yield from images
    else:
        yield images


def _as_pillow(item: Any) -> Image.Image:
    if isinstance(item, Image.Image):
        return item
    if not isinstance(item, (np.ndarray, torch.Tensor)):
        raise ImageError(
            f"{type(item).__name__} {repr(item)[:60]}: expected a PIL image (PIL.Image.open reads a file), a uint8 "
            "array (H, W, 3) or a uint8 tensor (3, H, W)"
        )
    if item.dtype not in (np.uint8, torch.uint8):
        raise ImageError(f"{item.dtype} of shape {tuple(item.shape)}: expected uint8 values from 0 to 255")
    is_tensor = isinstance(item, torch.Tensor)
    array = item.numpy(force=True) if is_tensor else item
    if array.ndim == 2:
        array = array[None] if is_tensor else array[..., None]
    axes = [axis for axis in ((0, -1) if is_tensor else (-1, 0)) if array.ndim == 3 and array.shape[axis] in (1, 3, 4)]
    if not axes or not array.size:
        raise ImageError(
            f"an array of shape {array.shape}: expected (H, W, C) or (C, H, W) with 1, 3 or 4 channels C, or (H, W), "
            "and no empty side"
        )
    channels_last = np.ascontiguousarray(np.moveaxis(array, axes[0], -1)[..., :3])  # a fourth channel is transparency
    return Image.fromarray(channels_last[..., 0] if channels_last.shape[-1] == 1 else channels_last)


def _padded(image: Image.Image, color: tuple[int, int, int]) -> Image.Image:
    """Centred on a square; of an odd number of lines the smaller half comes first."""
    width, height = image.size
    side = max(width, height)
    if width == height:
        return image
    _check_area(image, side, side)
    _load(image)
    canvas = Image.new(image.mode, (side, side), color)
    canvas.paste(image, ((side - width) // 2, (side - height) // 2))
    return canvas


def _centre(image: Image.Image, side: int) -> Image.Image:
    """Resizes the short side to `side` and crops the centre."""
    short = min(image.size)
    width, height = (side * length // short for length in image.size)
    _check_area(image, width, height)
    left, top = (width - side) // 2, (height - side) // 2
    return image.resize((width, height), Image.Resampling.BICUBIC).crop((left, top, left + side, top + side))


def _check_area(image: Image.Image, width: int, height: int) -> None:
    """Refuses what Pillow would not open: the size of a thin image grows without bounds on the way to a square."""
    limit = Image.MAX_IMAGE_PIXELS
    if limit is not None and width * height > 2 * limit:
        raise ImageError(
            f"{image.width} x {image.height} pixels have to become {width} x {height} on the way to a square, more "
            f"than twice PIL.Image.MAX_IMAGE_PIXELS={limit}: crop the image first, or raise that limit"
        )
