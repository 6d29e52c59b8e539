"""The published image resizing: OpenCV's 8-bit bilinear rule and mmcv's keep-ratio rule.

Detectron2 resizes with PIL, which differs by up to one grey level when enlarging and antialiases when shrinking.
"""

from __future__ import annotations

from collections.abc import Sequence

import cv2
import numpy as np
import torch
from detectron2.data.transforms import Augmentation, Transform
from torch import Tensor

__all__ = [
    "KeepRatioResize",
    "OpenCVResizeTransform",
    "ShortSideResize",
    "as_input",
    "keep_ratio_size",
    "short_side_size",
]

cv2.setNumThreads(0)  # a loading process has one core, and threads do not survive its fork


def keep_ratio_size(height: int, width: int, long_side: float, short_side: float) -> tuple[int, int]:
    """Height and width, at least 1, of the largest image with the same aspect ratio inside `long_side` by `short_side`.

    The frame is turned as the image lies. Each side is rounded half up on its own, as in mmcv (Detectron2's rule
    differs at exact halves).
    """
    scale = min(long_side / max(height, width), short_side / min(height, width))
    return max(int(height * scale + 0.5), 1), max(int(width * scale + 0.5), 1)


def short_side_size(height: int, width: int, short_side: int) -> tuple[int, int]:
    """Height and width with the same aspect ratio and a short side of `short_side`, however long the other becomes."""
    return keep_ratio_size(height, width, short_side * max(height, width) / min(height, width), short_side)


def _resize_nearest(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """Resizes labels or masks, (H, W) of any dtype, as OpenCV's INTER_NEAREST does, which takes few dtypes."""

    def source(old: int, new: int) -> np.ndarray:
        return np.minimum((np.arange(new) * (1.0 / (new / old))).astype(np.int64), old - 1)

    old_height, old_width = image.shape[:2]
    return image[source(old_height, height)[:, None], source(old_width, width)]


class OpenCVResizeTransform(Transform):
    """Resizes images as OpenCV does; coordinates scale by new / old per axis, masks take the nearest pixel.

    Args:
        h (int): height of the images it will be applied to.
        w (int): width of the images it will be applied to.
        new_h (int): height afterwards.
        new_w (int): width afterwards.
    """

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
        return _resize_nearest(segmentation, self.new_h, self.new_w)

    def inverse(self) -> OpenCVResizeTransform:
        """The resize from the new size back to the old one."""
        return OpenCVResizeTransform(self.new_h, self.new_w, self.h, self.w)


class KeepRatioResize(Augmentation):
    """Resizes so that the image just fits into a frame, keeping the aspect ratio: `keep_ratio_size` in OpenCV's pixels.

    Args:
        scales (list[tuple[int, int]]): frames as (long side, short side); one is drawn at random per image.
    """

    def __init__(self, scales: Sequence[Sequence[int]]) -> None:
        super().__init__()
        pairs = [tuple(scale) if isinstance(scale, Sequence) else (scale,) for scale in scales]
        if not pairs or any(len(pair) != 2 or min(pair) < 1 for pair in pairs):
            raise ValueError(f"scales={scales}: expected (long side, short side) pairs of positive numbers")
        self.scales = [(max(pair), min(pair)) for pair in pairs]

    def get_transform(self, image: np.ndarray) -> Transform:
        """Draws a frame and returns the resize of a (H, W) or (H, W, C) image that fits it into that."""
        height, width = image.shape[:2]
        index = np.random.randint(len(self.scales)) if len(self.scales) > 1 else 0
        return OpenCVResizeTransform(height, width, *keep_ratio_size(height, width, *self.scales[index]))


class ShortSideResize(Augmentation):
    """Gives the shorter side one length and leaves the longer one unlimited: the published segmentation test rule.

    Args:
        short_side (int): new length of the shorter side, enlarged or shrunk.
    """

    def __init__(self, short_side: int) -> None:
        super().__init__()
        if short_side < 1:
            raise ValueError(f"short_side={short_side}: expected a positive number of pixels")
        self.short_side = short_side

    def get_transform(self, image: np.ndarray) -> Transform:
        """Returns the resize of a (H, W) or (H, W, C) image that gives its shorter side the wanted length."""
        height, width = image.shape[:2]
        return OpenCVResizeTransform(height, width, *short_side_size(height, width, self.short_side))


def as_input(image: np.ndarray) -> Tensor:
    """An image (H, W, C) as a model takes it, (C, H, W)."""
    return torch.as_tensor(np.ascontiguousarray(image.transpose(2, 0, 1)))
