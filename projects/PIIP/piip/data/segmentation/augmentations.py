"""The published training augmentations of semantic segmentation, for images and label maps together.

The crop with a limit on the largest class is Detectron2's `RandomCrop_CategoryAreaConstraint`, which has the published
rule. If none of ten tries satisfies it, Detectron2 takes the tenth crop and the published code an eleventh.
"""

from __future__ import annotations

from collections.abc import Sequence

import cv2
import numpy as np
from detectron2.data.transforms import Augmentation, Transform

from ..transforms import OpenCVResizeTransform, keep_ratio_size

__all__ = ["PhotometricDistortion", "PhotometricTransform", "RatioRangeResize"]

_HUES = 180  # of OpenCV's 8-bit HSV: one step is two degrees


class RatioRangeResize(Augmentation):
    """Resizes so that the image just fits into a frame times a random ratio, keeping the aspect ratio.

    Args:
        scale (Sequence[int]): frame as (long side, short side); its sides times the ratio are rounded down.
        ratio_range (Sequence[float]): smallest and largest ratio.
    """

    def __init__(self, scale: Sequence[int], ratio_range: Sequence[float]) -> None:
        super().__init__()
        if len(scale) != 2 or min(scale) < 1:
            raise ValueError(f"scale={scale}: expected (long side, short side) in pixels")
        if len(ratio_range) != 2 or not 0 < ratio_range[0] <= ratio_range[1] or min(scale) * ratio_range[0] < 1:
            raise ValueError(f"ratio_range={ratio_range}: expected (smallest, largest), both positive")
        self.scale, self.ratio_range = (max(scale), min(scale)), tuple(ratio_range)

    def get_transform(self, image: np.ndarray) -> Transform:
        """Draws a ratio and returns the resize of a (H, W) or (H, W, C) image to the frame times it."""
        height, width = image.shape[:2]
        ratio = np.random.uniform(*self.ratio_range)
        long_side, short_side = (int(side * ratio) for side in self.scale)
        return OpenCVResizeTransform(height, width, *keep_ratio_size(height, width, long_side, short_side))


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
