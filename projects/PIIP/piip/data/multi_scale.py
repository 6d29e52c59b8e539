"""The published multi-scale training: DETR's augmentation, in proportion to the size of the crop."""

from __future__ import annotations

from typing import Any

import numpy as np
from detectron2.data.transforms import (
    AugInput,
    Augmentation,
    AugmentationList,
    CropTransform,
    RandomCrop,
    TransformList,
)

from .transforms import KeepRatioResize

__all__ = ["MultiScaleCrop", "PolygonCrop"]

# DETR's numbers, for crops of 1024 pixels
_CROP = 1024
_LONG_SIDE = 1333
_SHORT_SIDES = range(480, 801, 32)
_FIRST_SHORT_SIDES = (400, 500, 600)
_FIRST_CROP = (384, 600)


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

    def get_transform(self, *args: Any) -> TransformList:
        """Cannot say beforehand what will be done.

        Raises:
            NotImplementedError: Always.
        """
        raise NotImplementedError("the later steps depend on the image that the first ones give: call the augmentation")
