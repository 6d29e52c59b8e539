"""From pictures to the pixel tensors of the vision tower."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar, Literal, TypedDict

import numpy as np
import torch
from PIL import Image
from transformers import BaseImageProcessor, BatchFeature, TensorType
from transformers.image_utils import ChannelDimension

from piip_core.errors import ConfigError, UserError
from piip_core.images import misread_values, plain_rgb

__all__ = ["ImageError", "PIIPImageProcessor", "PIIPImageProcessorKwargs", "rgb_image"]

# Modes in which padding before the conversion makes a difference; at gray pictures the public code stops there
_OWN_COLOURS = ("P", "CMYK")
# In the files of image processors beside their settings
_NAMES_OF_CLASSES = ("processor_class", "image_processor_type")
_CHOICES = {
    "pad_to_square": (True, False),
    "convert_before_padding": (True, False),
    "input_data_format": (None, "channels_first", "channels_last"),
}


class ImageError(UserError):
    """Something that is no picture, or one that cannot be used; the message says which and what to give instead."""


class PIIPImageProcessorKwargs(TypedDict, total=False):
    """Settings of `PIIPImageProcessor`, for its constructor and for a single call."""

    size: int | dict[str, int] | None
    pad_to_square: bool | None
    background_color: Sequence[int] | None
    convert_before_padding: bool | None
    image_mean: Sequence[float] | None
    image_std: Sequence[float] | None
    input_data_format: str | None
    return_tensors: str | TensorType | None


class PIIPImageProcessor(BaseImageProcessor):
    """Makes every picture a square of the size of the last branch's image, as the published models were trained.

    Pad to a square, or not; resize the short side (bicubic); crop the centre; scale to [0, 1]; subtract the mean and
    divide by the standard deviation of ImageNet (also for CLIP branches).

    Pictures may be PIL images, uint8 numpy arrays (H, W, C), uint8 torch tensors (C, H, W), gray ones without the
    axis C, batches of those with a leading axis, or lists of all these. They become RGB first: transparency is dropped
    and not blended, the first frame stands for an animation, an orientation tag is ignored (but Pillow itself follows
    that of TIFF files). Arrays in the other order of axes are recognised as long as it is clear; `input_data_format`
    ("channels_first", "channels_last") decides.

    The result has `pixel_values` (N, 3, size, size), float32.

    Args:
        size: Side of the result in pixels, an int or {"height": S, "width": S}.
        pad_to_square: Pad the short side with `background_color` (second training stage, evaluation). False leaves
            what does not fit into the square out (first training stage).
        background_color: RGB of the padding.
        convert_before_padding: False pads palette and CMYK images before they become RGB, which spoils their colours.
            The published results on ScienceQA and MMBench were made that way.
        image_mean: Per channel, RGB, of values in [0, 1].
        image_std: Per channel, RGB, of values in [0, 1].

    Raises:
        ConfigError: For an unknown setting or a value that cannot work.
        ImageError: When called with something that is no usable picture.
    """

    valid_kwargs = PIIPImageProcessorKwargs

    size: ClassVar = {"height": 512, "width": 512}
    pad_to_square = True
    background_color = (123, 116, 103)  # ImageNet's mean, rounded down
    convert_before_padding = True
    image_mean = (0.485, 0.456, 0.406)
    image_std = (0.229, 0.224, 0.225)
    input_data_format = None
    return_tensors = None

    def __init__(self, **kwargs: Any) -> None:
        known = (*self.valid_kwargs.__annotations__, *_NAMES_OF_CLASSES)
        for name in kwargs:
            if name not in known:
                raise ConfigError(f"PIIPImageProcessor has no setting {name!r}: expected {', '.join(known)}")
        super().__init__(**self._settings({n: value for n, value in kwargs.items() if n not in _NAMES_OF_CLASSES}))

    @property
    def image_size(self) -> int:
        """Side of the result in pixels."""
        return self.size["height"]

    def _settings(self, given: dict[str, Any]) -> dict[str, Any]:
        """All settings, those that are not given as the processor has them."""
        names = self.valid_kwargs.__annotations__
        if unknown := sorted(set(given) - set(names)):
            raise TypeError(f"{', '.join(unknown)}: no such setting; known: {', '.join(names)}")
        settings = {name: getattr(self, name) if given.get(name) is None else given[name] for name in names}
        settings["size"] = _square(settings["size"])
        settings["background_color"] = _per_channel("background_color", settings, int, (0, 255))
        settings["image_mean"] = _per_channel("image_mean", settings, (int, float), (0, 1))
        settings["image_std"] = _per_channel("image_std", settings, (int, float), (1e-6, math.inf))
        for name, choices in _CHOICES.items():
            if settings[name] not in choices:
                expected = ", ".join(map(repr, choices))
                raise ConfigError(f"PIIPImageProcessor.{name} is {settings[name]!r}: expected one of {expected}")
        return settings

    def preprocess(self, images: Any, **kwargs: Any) -> BatchFeature:
        """Pixel values of pictures; a call of the processor is the same.

        Args:
            images: See the class.
            **kwargs: Settings for this call; `return_tensors="pt"` for a tensor instead of an array.

        Returns:
            `pixel_values` (N, 3, size, size), float32.

        Raises:
            ConfigError: For a value that cannot work.
            ImageError: For something that is no usable picture.
            TypeError: For an unknown setting.
        """
        settings = self._settings(kwargs)
        return_tensors, layout = settings.pop("return_tensors"), settings.pop("input_data_format")
        pictures = [_picture(item, layout, f"image {i}") for i, item in enumerate(_flat(images))]
        if not pictures:
            raise ImageError("no images were given: expected at least one")
        pixels = np.stack([self._pixels(picture, i, **settings) for i, picture in enumerate(pictures)])
        return BatchFeature(data={"pixel_values": pixels}, tensor_type=return_tensors)

    def _pixels(
        self,
        image: Image.Image,
        index: int,
        *,
        size: dict[str, int],
        pad_to_square: bool,
        background_color: tuple[int, int, int],
        convert_before_padding: bool,
        image_mean: tuple[float, float, float],
        image_std: tuple[float, float, float],
    ) -> np.ndarray:
        """Pixel values (3, size, size) of one picture."""
        try:
            if convert_before_padding or image.mode not in _OWN_COLOURS:
                image = rgb_image(image)
            if pad_to_square:
                image = _padded(image, background_color)
            image = _centre(rgb_image(image), size["height"])
        except ImageError as error:
            raise ImageError(f"image {index}: {error}") from error.__cause__
        # In place and in single precision: several times faster than the library's steps
        pixels = np.moveaxis(np.asarray(image), -1, 0).astype(np.float32, order="C")
        mean, std = (255 * np.array(values, np.float32)[:, None, None] for values in (image_mean, image_std))
        pixels -= mean
        pixels /= std
        return pixels


def rgb_image(image: Image.Image) -> Image.Image:
    """A picture as 8-bit RGB: transparency dropped, first frame, orientation tag ignored, 16-bit gray scaled.

    Raises:
        ImageError: If the file behind the picture is broken, or its mode says nothing of the range of its values.
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
    """Decodes the file behind a picture, which opening it does not do."""
    try:
        image.load()
    except (OSError, SyntaxError, ValueError) as error:
        name = getattr(image, "filename", "") or "its file"
        raise ImageError(f"{name} cannot be read ({error}): replace it or leave it out") from error


def _per_channel(name: str, settings: dict[str, Any], types: Any, bounds: tuple[float, float]) -> tuple[Any, ...]:
    value, (low, high) = settings[name], bounds
    numbers = tuple(value) if isinstance(value, (list, tuple)) else ()
    if len(numbers) != 3 or not all(isinstance(number, types) and low <= number <= high for number in numbers):
        expected = f"3 numbers from {low:g} to {high:g}, red first"
        raise ConfigError(f"PIIPImageProcessor.{name} is {value}: expected {expected}")
    return numbers


def _square(size: Any) -> dict[str, int]:
    try:
        sides = dict(size)
    except (TypeError, ValueError):
        sides = {"height": size, "width": size}
    height, width = sides.get("height"), sides.get("width")
    if set(sides) != {"height", "width"} or height != width or not isinstance(height, int) or height < 1:
        raise ConfigError(
            f"PIIPImageProcessor.size is {size}: expected the side of the last branch's image in pixels, "
            "an int or {'height': S, 'width': S}"
        )
    return sides


def _flat(images: Any) -> Iterator[Any]:
    """Single pictures out of a picture, a batch, or nested lists of them."""
    if isinstance(images, (list, tuple)):
        for item in images:
            yield from _flat(item)
    elif isinstance(images, (np.ndarray, torch.Tensor)) and images.ndim == 4:
        yield from images
    else:
        yield images


def _picture(item: Any, layout: str | None, name: str) -> Image.Image:
    if isinstance(item, Image.Image):
        return item
    if not isinstance(item, (np.ndarray, torch.Tensor)):
        raise ImageError(
            f"{name} is {type(item).__name__} {_short(item)}: expected a PIL image (PIL.Image.open reads a file), "
            "a uint8 array (H, W, 3) or a uint8 tensor (3, H, W)"
        )
    shape, is_tensor = tuple(item.shape), isinstance(item, torch.Tensor)
    if item.dtype not in (np.uint8, torch.uint8):
        raise ImageError(f"{name} is {item.dtype} of shape {shape}: expected uint8 values from 0 to 255")
    array = item.numpy(force=True) if is_tensor else item
    if array.ndim == 2 and array.size:
        return Image.fromarray(np.ascontiguousarray(array))
    axis = _channel_axis(shape, ChannelDimension(layout) if layout else None, last=not is_tensor)
    if axis is None or not array.size:
        raise ImageError(
            f"{name} has the shape {shape}: expected (H, W, C) or (C, H, W) with 1, 3 or 4 channels C, or (H, W), "
            "and no empty side"
        )
    channels_last = np.ascontiguousarray(np.moveaxis(array, axis, -1)[..., :3])  # a fourth channel is transparency
    return Image.fromarray(channels_last[..., 0] if channels_last.shape[-1] == 1 else channels_last)


def _channel_axis(shape: tuple[int, ...], layout: ChannelDimension | None, *, last: bool) -> Literal[-1, 0] | None:
    """Where the channels are: as asked, otherwise at the end or the start by the custom of the library."""
    if len(shape) != 3:
        return None
    places = {ChannelDimension.LAST: -1, ChannelDimension.FIRST: 0}
    order = [places[layout]] if layout else [-1, 0] if last else [0, -1]
    return next((axis for axis in order if shape[axis] in (1, 3, 4)), None)


def _short(item: Any) -> str:
    text = repr(item)
    return text if len(text) <= 60 else f"{text[:57]}..."


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
    """Refuses what Pillow would not open: the size of a thin picture grows without bounds on the way to a square."""
    limit = Image.MAX_IMAGE_PIXELS
    if limit is not None and width * height > 2 * limit:
        raise ImageError(
            f"{image.width} x {image.height} pixels have to become {width} x {height} on the way to a square, more "
            f"than twice PIL.Image.MAX_IMAGE_PIXELS={limit}: crop the image first, or raise that limit"
        )
