"""The published augmentations: OpenCV's 8-bit bilinear resizing, mmcv's sizes, multi-scale crops, and colours.

Detectron2 resizes with PIL, which differs by up to one grey level when enlarging and antialiases when shrinking. The
crop of segmentation with a limit on the largest class is Detectron2's `RandomCrop_CategoryAreaConstraint`, which has
the published rule. If none of ten tries satisfies it, Detectron2 takes the tenth crop and the published code an
eleventh.
"""

from __future__ import annotations

from collections.abc import Sequence

import cv2
import numpy as np
import torch
from detectron2.data.transforms import (
    AugInput,
    Augmentation,
    AugmentationList,
    CropTransform,
    RandomCrop,
    Transform,
    TransformList,
)
from torch import Tensor

cv2.setNumThreads(0)  # a loading process has one core, and threads do not survive its fork

_HUES = 180  # of OpenCV's 8-bit HSV: one step is two degrees

# DETR's numbers, for crops of 1024 pixels
_CROP = 1024
_LONG_SIDE = 1333
_SHORT_SIDES = range(480, 801, 32)
_FIRST_SHORT_SIDES = (400, 500, 600)
_FIRST_CROP = (384, 600)


def keep_ratio_size(height: int, width: int, long_side: float, short_side: float) -> tuple[int, int]:
    """Height and width, at least 1, of the largest image with the same aspect ratio inside `long_side` by `short_side`.

    The frame is turned as the image lies. Each side is rounded half up on its own, as in mmcv (Detectron2's rule
    differs at exact halves).
    """
    scale = min(long_side / max(height, width), short_side / min(height, width))
    return max(int(height * scale + 0.5), 1), max(int(width * scale + 0.5), 1)


class OpenCVResizeTransform(Transform):
    """Resizes images of h x w pixels as OpenCV does; coordinates scale by new / old, masks take the nearest pixel."""

    def __init__(self, h: int, w: int, new_h: int, new_w: int) -> None:
        super().__init__()
        self.h, self.w, self.new_h, self.new_w = h, w, new_h, new_w

    def _check_size(self, image: np.ndarray) -> None:
        if image.shape[:2] != (self.h, self.w):
            raise ValueError(f"image of {image.shape[:2]} given to a transform made for {(self.h, self.w)} (h, w)")

    def apply_image(self, img: np.ndarray) -> np.ndarray:
        """Resizes a (H, W) or (H, W, C) uint8 image; same dimensions back."""
        self._check_size(img)
        if img.dtype != np.uint8:
            raise TypeError(f"image of {img.dtype}: expected uint8, the published pipeline resizes 8-bit images")
        return cv2.resize(img, (self.new_w, self.new_h), interpolation=cv2.INTER_LINEAR)

    def apply_coords(self, coords: np.ndarray) -> np.ndarray:
        """Scales (N, 2) points, each (x, y), of any dtype: annotation files hold integers too."""
        return coords * np.array([self.new_w / self.w, self.new_h / self.h])

    def apply_segmentation(self, segmentation: np.ndarray) -> np.ndarray:
        """Resizes a (H, W) mask or label map of any dtype."""
        self._check_size(segmentation)
        # As OpenCV's INTER_NEAREST does, which takes few dtypes
        rows, columns = (
            np.minimum((np.arange(new) * (1.0 / (new / old))).astype(np.int64), old - 1)
            for old, new in ((self.h, self.new_h), (self.w, self.new_w))
        )
        return segmentation[rows[:, None], columns]

    def inverse(self) -> OpenCVResizeTransform:
        """The resize from the new size back to the old one."""
        return OpenCVResizeTransform(self.new_h, self.new_w, self.h, self.w)


class KeepRatioResize(Augmentation):
    """Resizes so that the image just fits into a frame, keeping the aspect ratio: `keep_ratio_size` in OpenCV's pixels.

    Args:
        scales (list[tuple[float, float]]): frames as (long side, short side); one is drawn at random per image. An
            infinite long side leaves that of the image unlimited.
        ratio_range (tuple[float, float]): smallest and largest factor of the frame, drawn at random per image; sides
            times the factor are rounded down. None for the frame itself.
    """

    def __init__(self, scales: Sequence[Sequence[float]], ratio_range: Sequence[float] | None = None) -> None:
        super().__init__()
        pairs = [tuple(scale) if isinstance(scale, Sequence) else (scale,) for scale in scales]
        if not pairs or any(len(pair) != 2 or min(pair) < 1 for pair in pairs):
            raise ValueError(f"scales={scales}: expected (long side, short side) pairs of positive numbers")
        if ratio_range is not None and not (len(ratio_range) == 2 and 0 < ratio_range[0] <= ratio_range[1]):
            raise ValueError(f"ratio_range={ratio_range}: expected (smallest, largest), both positive")
        self.scales, self.ratio_range = [(max(pair), min(pair)) for pair in pairs], ratio_range

    def get_transform(self, image: np.ndarray) -> Transform:
        """Draws a frame and returns the resize of a (H, W) or (H, W, C) image that fits it into that."""
        height, width = image.shape[:2]
        frame = self.scales[np.random.randint(len(self.scales)) if len(self.scales) > 1 else 0]
        if self.ratio_range is not None:
            ratio = np.random.uniform(*self.ratio_range)
            frame = [int(side * ratio) for side in frame]
        return OpenCVResizeTransform(height, width, *keep_ratio_size(height, width, *frame))


class _PolygonCropTransform(CropTransform):
    """Crops polygons by moving them: what lies outside vanishes when they are drawn into the cropped image.

    Detectron2's own intersects every polygon with the crop, for which it needs another library.
    """

    def apply_coords(self, coords: np.ndarray) -> np.ndarray:
        return coords - np.array([self.x0, self.y0])

    def apply_polygons(self, polygons: list[np.ndarray]) -> list[np.ndarray]:
        return [self.apply_coords(polygon) for polygon in polygons]


class PolygonCrop(RandomCrop):
    """Detectron2's `RandomCrop` for masks that are drawn after the crop (`instance_mask_format="bitmask"`)."""

    def get_transform(self, image: np.ndarray) -> CropTransform:
        """Draws a crop of a (H, W, C) image."""
        crop = super().get_transform(image)
        return _PolygonCropTransform(crop.x0, crop.y0, crop.w, crop.h)


class MultiScaleCrop(Augmentation):
    """Resizes to one of several sizes, or with equal chance resizes, crops and resizes again; then crops.

    With a crop of 1024 pixels: short sides of 480 to 800 in steps of 32 with at most 1333 pixels on the long side; or
    first short sides of 400, 500 or 600 and a crop with sides of 384 to 600, each drawn on its own. The last crop takes
    at most 1024 x 1024. For another crop all these numbers scale with it, rounded down. A crop may hold no object.

    Args:
        crop (int): sides of the last crop in pixels.
    """

    def __init__(self, crop: int) -> None:
        super().__init__()
        if not isinstance(crop, int) or crop < 32:
            raise ValueError(f"crop={crop!r}: expected a number of pixels of at least 32, for example 1024")

        def scaled(*sides: int) -> list[int]:
            return [side * crop // _CROP for side in sides]

        (long_side,) = scaled(_LONG_SIDE)
        resize = KeepRatioResize([(long_side, side) for side in scaled(*_SHORT_SIDES)])
        first = KeepRatioResize([(long_side, side) for side in scaled(*_FIRST_SHORT_SIDES)])
        self._policies = (
            AugmentationList([resize]),
            AugmentationList([first, PolygonCrop("absolute_range", tuple(scaled(*_FIRST_CROP))), resize]),
        )
        self._crop = PolygonCrop("absolute_range", (crop, crop))
        self.crop = crop

    def __call__(self, aug_input: AugInput) -> TransformList:
        """Changes `aug_input` in place and returns what was done to it."""
        policy = self._policies[np.random.randint(len(self._policies))]
        return TransformList([policy(aug_input), self._crop(aug_input)])


class PhotometricTransform(Transform):
    """Adds `brightness`, multiplies by `contrast` and `saturation`, adds `hue`; each in 8 bits; labels stay.

    Contrast comes first, or after saturation and hue. Hue has steps of two degrees; it and saturation may be None.
    """

    def __init__(
        self, brightness: float, contrast: float, contrast_first: bool, saturation: float | None, hue: int | None
    ) -> None:
        super().__init__()
        self.brightness, self.contrast, self.contrast_first = brightness, contrast, contrast_first
        self.saturation, self.hue = saturation, hue

    def apply_image(self, img: np.ndarray) -> np.ndarray:
        """Distorts a (H, W, 3) uint8 image, RGB or BGR: exchanging the two only turns the hue the other way."""
        if img.dtype != np.uint8 or img.ndim != 3 or img.shape[2] != 3:
            raise ValueError(f"image of shape {img.shape}, {img.dtype}: expected (H, W, 3) uint8")
        img = _scaled(img, 1.0, self.brightness)
        if self.contrast_first:
            img = _scaled(img, self.contrast, 0.0)
        # Through HSV and back for each: every way rounds
        if self.saturation is not None:
            hsv = cv2.cvtColor(img, cv2.COLOR_RGB2HSV)
            hsv[..., 1] = _scaled(hsv[..., 1], self.saturation, 0.0)
            img = cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB)
        if self.hue is not None:
            hsv = cv2.cvtColor(img, cv2.COLOR_RGB2HSV)
            hsv[..., 0] = (hsv[..., 0].astype(np.int64) + self.hue) % _HUES
            img = cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB)
        return img if self.contrast_first else _scaled(img, self.contrast, 0.0)

    def apply_coords(self, coords: np.ndarray) -> np.ndarray:
        """Leaves points as they are."""
        return coords

    def apply_segmentation(self, segmentation: np.ndarray) -> np.ndarray:
        """Leaves label maps as they are."""
        return segmentation


class PhotometricDistortion(Augmentation):
    """Draws brightness, contrast, saturation and hue, each with a probability of one half (SSD's distortion).

    Contrast comes before saturation and hue, or after them, with equal probability.
    """

    def get_transform(self, image: np.ndarray) -> Transform:
        """Draws what to change; the image itself does not matter."""

        def drawn() -> bool:
            return np.random.randint(2) == 1

        return PhotometricTransform(
            brightness=np.random.uniform(-32, 32) if drawn() else 0.0,
            contrast=np.random.uniform(0.5, 1.5) if drawn() else 1.0,
            contrast_first=drawn(),
            saturation=np.random.uniform(0.5, 1.5) if drawn() else None,
            hue=np.random.randint(-18, 18) if drawn() else None,
        )


def _scaled(values: np.ndarray, factor: float, shift: float) -> np.ndarray:
    """uint8 values times factor plus shift, in float32, cut to 0..255 and rounded down."""
    if factor == 1.0 and shift == 0.0:
        return values
    return np.clip(values.astype(np.float32) * np.float32(factor) + np.float32(shift), 0, 255).astype(np.uint8)


def as_input(image: np.ndarray) -> Tensor:
    """An image (H, W, C) as a model takes it, (C, H, W)."""
    return torch.as_tensor(np.ascontiguousarray(image.transpose(2, 0, 1)))
