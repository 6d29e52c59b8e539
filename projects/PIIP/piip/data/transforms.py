"""The published image resizing in numbers: OpenCV's 8-bit bilinear rule and mmcv's keep-ratio rule, without OpenCV.

Detectron2 resizes with PIL, which differs by up to one grey level when enlarging and antialiases when shrinking.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from detectron2.data.transforms import Augmentation, Transform

__all__ = [
    "KeepRatioResize",
    "OpenCVResizeTransform",
    "ShortSideResize",
    "keep_ratio_size",
    "resize_bilinear",
    "resize_nearest",
    "short_side_size",
]

_WEIGHT_BITS = 11  # OpenCV's fixed-point weights: 1.0 is 2048


def keep_ratio_size(height: int, width: int, long_side: float, short_side: float) -> tuple[int, int]:
    """Largest size with the image's aspect ratio that fits into `long_side` by `short_side`, whichever way it lies.

    Each side is rounded half up on its own, as in mmcv (Detectron2's rule differs at exact halves).

    Args:
        height: Image height in pixels.
        width: Image width in pixels.
        long_side: Limit of the longer side.
        short_side: Limit of the shorter side.

    Returns:
        New height and width, at least 1.
    """
    scale = min(long_side / max(height, width), short_side / min(height, width))
    return max(int(height * scale + 0.5), 1), max(int(width * scale + 0.5), 1)


def short_side_size(height: int, width: int, short_side: int) -> tuple[int, int]:
    """Size with the image's aspect ratio and a short side of exactly `short_side`, however long the other becomes.

    Args:
        height: Image height in pixels.
        width: Image width in pixels.
        short_side: New length of the shorter side.

    Returns:
        New height and width.
    """
    return keep_ratio_size(height, width, short_side * max(height, width) / min(height, width), short_side)


def _bilinear_taps(old: int, new: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Lower source index (may lie outside the image) and the two integer weights of every output index."""
    centre = ((np.arange(new, dtype=np.float64) + 0.5) * (old / new) - 0.5).astype(np.float32)
    lower = np.floor(centre)
    fraction = centre - lower
    one = np.float32(1 << _WEIGHT_BITS)
    high = np.rint(fraction * one).astype(np.int32)  # rint rounds halves to even, as OpenCV does
    low = np.rint((np.float32(1) - fraction) * one).astype(np.int32)
    return lower.astype(np.int64), low, high


def resize_bilinear(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """Resizes an 8-bit image exactly as OpenCV's `resize` with INTER_LINEAR does, bit for bit.

    Args:
        image: (H, W) or (H, W, C) uint8.
        height: New height.
        width: New width.

    Returns:
        (height, width) or (height, width, C) uint8.

    Raises:
        TypeError: If the image is not uint8: the rule is defined in 8-bit fixed point.
        ValueError: If the image is not two- or three-dimensional, or a side is less than 1.
    """
    _check_image(image, height, width)
    old_height, old_width = image.shape[:2]
    shape = (height, width, *image.shape[2:])
    image = image.reshape(old_height, old_width, -1)
    channels = image.shape[2]

    left, low, high = _bilinear_taps(old_width, width)
    outside = (left < 0) | (left >= old_width - 1)
    low[outside], high[outside] = 1 << _WEIGHT_BITS, 0  # columns beyond the border take the border pixel alone
    left = np.clip(left, 0, old_width - 1)
    right = np.minimum(left + 1, old_width - 1)
    rows = np.multiply(np.take(image, left, axis=1).reshape(old_height, -1), np.repeat(low, channels), dtype=np.int32)
    rows += np.multiply(
        np.take(image, right, axis=1).reshape(old_height, -1), np.repeat(high, channels), dtype=np.int32
    )
    rows >>= 4

    top, low, high = _bilinear_taps(old_height, height)
    bottom = np.clip(top + 1, 0, old_height - 1)  # rows beyond the border keep both weights, on the same row
    top = np.clip(top, 0, old_height - 1)
    output = np.empty((height, width * channels), dtype=np.uint8)
    upper, lower = np.empty((2, width * channels), dtype=np.int32)
    # Row by row, so that the operands stay in the processor's first cache: twice as fast as whole-image arithmetic.
    for y, (row0, row1, weight0, weight1) in enumerate(zip(top, bottom, low, high, strict=True)):
        np.multiply(rows[row0], weight0, out=upper)
        np.right_shift(upper, 16, out=upper)
        np.multiply(rows[row1], weight1, out=lower)
        np.right_shift(lower, 16, out=lower)
        upper += lower
        upper += 2
        np.right_shift(upper, 2, out=output[y], casting="unsafe")  # at most 255
    return output.reshape(shape)


def resize_nearest(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """Resizes labels or masks exactly as OpenCV's `resize` with INTER_NEAREST does.

    Args:
        image: (H, W) or (H, W, C) of any dtype.
        height: New height.
        width: New width.

    Raises:
        ValueError: If the image is not two- or three-dimensional, or a side is less than 1.
    """
    _check_shape(image, height, width)

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
        return resize_bilinear(img, self.new_h, self.new_w)

    def apply_coords(self, coords: np.ndarray) -> np.ndarray:
        """Scales (N, 2) points, each (x, y), of any dtype: annotation files hold integers too."""
        return coords * np.array([self.new_w / self.w, self.new_h / self.h])

    def apply_segmentation(self, segmentation: np.ndarray) -> np.ndarray:
        """Resizes a (H, W) mask or label map of any dtype."""
        self._check_size(segmentation)
        return resize_nearest(segmentation, self.new_h, self.new_w)

    def inverse(self) -> OpenCVResizeTransform:
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
        height, width = image.shape[:2]
        return OpenCVResizeTransform(height, width, *short_side_size(height, width, self.short_side))


def _check_shape(image: np.ndarray, height: int, width: int) -> None:
    if image.ndim not in (2, 3) or 0 in image.shape:
        raise ValueError(f"image of shape {image.shape}: expected (H, W) or (H, W, C), nothing empty")
    if height < 1 or width < 1:
        raise ValueError(f"new size {height} x {width}: expected at least 1 x 1")


def _check_image(image: np.ndarray, height: int, width: int) -> None:
    _check_shape(image, height, width)
    if image.dtype != np.uint8:
        raise TypeError(f"image of {image.dtype}: expected uint8, the published pipeline resizes 8-bit images")
