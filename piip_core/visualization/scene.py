"""The image that is looked into: as people see it, as the network sees it, and the position that is asked about."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import UserError

Box = tuple[int, int, int, int]
"""First row and column of some cells, and the row and column after the last."""


@dataclass(frozen=True)
class Cells:
    """The feature cells of a map, laid over the image."""

    rows: int
    columns: int
    size: tuple[float, float]  # height and width of a cell in pixels of the network's input

    def at(self, x: float, y: float) -> tuple[int, int]:
        """Row and column of the cell over a point; the nearest one where the network cuts the border off."""
        row, column = int(y / self.size[0]), int(x / self.size[1])
        return min(max(row, 0), self.rows - 1), min(max(column, 0), self.columns - 1)

    def inside(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns that lie completely on the image and not on its padding, at least 1 x 1."""
        rows, columns = int(height / self.size[0]), int(width / self.size[1])
        return min(max(rows, 1), self.rows), min(max(columns, 1), self.columns)

    @property
    def extent(self) -> tuple[float, float]:
        """Width and height of the map in pixels of the network's input."""
        return self.columns * self.size[1], self.rows * self.size[0]


@dataclass(frozen=True)
class Scene:
    """An image ready for a network, and the position of the query.

    Points on it are (x, y) in pixels of `image`; the centre of its first pixel is (0.5, 0.5).
    """

    image: np.ndarray  # resized, before normalisation and padding, (H, W, 3) uint8, RGB
    pixel_values: Tensor  # what the pyramid gets, (1, 3, H', W'): normalised, padded at the bottom and right
    query: tuple[float, float]  # the position asked about
    query_pixel: tuple[int, int]  # the same as it was given, in pixels of the original image
    original_size: tuple[int, int]  # height and width

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the image, without padding."""
        return self.image.shape[:2]


def network_input(
    original: np.ndarray,
    *,
    long_side: int,
    short_side: int,
    pixel_mean: Sequence[float],
    pixel_std: Sequence[float],
    pad_divisor: int,
) -> tuple[np.ndarray, Tensor]:
    """The published test-time transform: resize to just fit into a frame, normalise, pad with zeros.

    Pixels may differ from those of OpenCV's resizing, which the published models were tested with, by one in 255.

    Args:
        original: (H, W, 3) uint8, RGB.
        long_side: Limit of the longer side.
        short_side: Limit of the shorter side.
        pixel_mean: Per channel.
        pixel_std: Per channel.
        pad_divisor: Sides of the padded image are multiples of it.

    Returns:
        The resized image (h, w, 3) uint8, and the network's input (1, 3, h', w').
    """
    height, width = original.shape[:2]
    scale = min(long_side / max(height, width), short_side / min(height, width))
    size = [max(int(side * scale + 0.5), 1) for side in (height, width)]
    pixels = torch.from_numpy(np.array(original)).permute(2, 0, 1)[None].float()
    pixels = F.interpolate(pixels, size=size, mode="bilinear", align_corners=False).round()
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (pixel_mean, pixel_std))
    right, bottom = (-side % pad_divisor for side in reversed(size))
    padded = F.pad((pixels - mean) / std, (0, right, 0, bottom))
    return pixels[0].permute(1, 2, 0).to(torch.uint8).numpy(), padded


def prepare_scene(
    original_size: tuple[int, int], image: np.ndarray, pixel_values: Tensor, query: tuple[int, int] | None = None
) -> Scene:
    """Puts the query, (x, y) in pixels of the original image or None for its centre, onto the resized image.

    Raises:
        UserError: If the query lies outside of the image.
    """
    height, width = original_size
    x, y = query if query is not None else (width // 2, height // 2)
    if not (0 <= x < width and 0 <= y < height):
        raise UserError(
            f"query {x},{y}: outside of the image of {width} x {height} pixels; expected x from 0 to {width - 1} and y "
            f"from 0 to {height - 1}"
        )
    point = ((x + 0.5) * image.shape[1] / width, (y + 0.5) * image.shape[0] / height)
    return Scene(image, pixel_values, point, (x, y), (height, width))
