"""Boxes and ground truth of DINO, and where the cells of padded feature maps lie: masks, sine encodings, points.

Boxes are (cx, cy, w, h) relative to the un-padded image.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from detectron2.structures import Instances
from torch import Tensor
from torchvision.ops import box_convert

_MAP_TEMPERATURE = 20
_BOX_TEMPERATURE = 10_000
_EPS = 1e-3  # Deformable DETR has 1e-5; DINO's boxes and their noise are meant for this one


def inverse_sigmoid(x: Tensor) -> Tensor:
    """Logit of values in [0, 1], kept finite: neither x nor 1 - x counts as less than 1e-3."""
    x = x.clamp(min=0, max=1)
    return torch.log(x.clamp(min=_EPS) / (1 - x).clamp(min=_EPS))


@dataclass(frozen=True)
class Target:
    """Ground truth of one image."""

    labels: Tensor  # (N,) int64
    boxes: Tensor  # (N, 4) as (cx, cy, w, h) relative to the un-padded image
    scale: Tensor  # (4,) width, height, width, height of the un-padded image in pixels

    @property
    def pixel_boxes(self) -> Tensor:
        """(N, 4) as (x1, y1, x2, y2) in pixels."""
        return box_convert(self.boxes, "cxcywh", "xyxy") * self.scale


def image_scale(image_size: tuple[int, int], *, like: Tensor) -> Tensor:
    """(4,) width, height, width, height of an image of height and width `image_size`."""
    height, width = image_size
    return like.new_tensor((width, height, width, height))


def make_target(instances: Instances, num_classes: int, device: torch.device, dtype: torch.dtype) -> Target:
    """Ground truth of an image from its `gt_boxes` and `gt_classes`.

    Raises:
        ValueError: If a class is not one of the model's.
    """
    labels = instances.gt_classes
    if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < num_classes:
        raise ValueError(
            f"gt_classes from {int(labels.min())} to {int(labels.max())}: expected 0 to {num_classes - 1}, as the "
            f"model has num_classes={num_classes}; data.num_classes sets it"
        )
    boxes = instances.gt_boxes.tensor.to(device, dtype)
    scale = image_scale(instances.image_size, like=boxes)
    return Target(labels.to(device), box_convert(boxes / scale, "xyxy", "cxcywh"), scale)


@dataclass(frozen=True)
class Levels:
    """The maps of a batch laid out as one sequence of S cells, level by level and row by row."""

    shapes: tuple[tuple[int, int], ...]  # height and width of every map
    padding_mask: Tensor  # (B, S) bool, True where a cell is padding
    valid_sizes: Tensor  # (B, levels, 2) number of cells in x and y that are not padding

    @classmethod
    def of(cls, masks: Sequence[Tensor], dtype: torch.dtype = torch.float32) -> Levels:
        """Layout of maps with the given padding masks (B, H, W)."""
        sizes = [torch.stack(((~m[:, 0]).sum(dim=1), (~m[:, :, 0]).sum(dim=1)), dim=-1) for m in masks]
        return cls(
            shapes=tuple((m.shape[1], m.shape[2]) for m in masks),
            padding_mask=torch.cat([m.flatten(1) for m in masks], dim=1),
            valid_sizes=torch.stack(sizes, dim=1).to(dtype),
        )

    @property
    def valid_ratios(self) -> Tensor:
        """(B, levels, 2): share of every map, in x and y, that is not padding."""
        sizes = [self.valid_sizes.new_full((), side) for height, width in self.shapes for side in (width, height)]
        return self.valid_sizes / torch.stack(sizes).view(-1, 2)

    def cell_centres(self) -> Tensor:
        """(B, S, 2): centres (x, y) of the cells, where 1 is the border of the un-padded image."""
        device, dtype = self.valid_sizes.device, self.valid_sizes.dtype
        centres = []
        for level, (height, width) in enumerate(self.shapes):
            y, x = (torch.arange(side, device=device, dtype=dtype) + 0.5 for side in (height, width))
            cells = torch.stack((x.expand(height, width), y[:, None].expand(height, width)), dim=-1)
            centres.append(cells.view(1, -1, 2) / self.valid_sizes[:, None, level])
        return torch.cat(centres, dim=1)

    def reference_points(self) -> Tensor:
        """(B, S, levels, 2): centres of the cells as fractions of each level's padded map."""
        return self.cell_centres()[:, :, None] * self.valid_ratios[:, None]


def padding_masks(
    image_sizes: Sequence[tuple[int, int]],
    padded_size: tuple[int, int],
    map_sizes: Sequence[tuple[int, int]],
    *,
    device: torch.device | str | None = None,
) -> list[Tensor]:
    """Which cells of maps are padding, those whose nearest pixel lies outside the image: (B, H, W) bool for every map.

    Sizes are height and width: of every image before padding, of the padded batch, and of every map.
    """
    padding = torch.ones(1, len(image_sizes), *padded_size, device=device)
    for image, (height, width) in enumerate(image_sizes):
        padding[:, image, :height, :width] = 0
    return [F.interpolate(padding, size=tuple(size))[0] > 0 for size in map_sizes]


def map_encoding(mask: Tensor, embed_dim: int) -> Tensor:
    """Sine encoding of the cells of a map, which runs from 0 to 2 pi over the image without its padding.

    Of a mask (B, H, W) bool, True for padding: (B, H, W, embed_dim) float32, features of y first; `embed_dim` is a
    multiple of 4.
    """
    valid = (~mask).float()
    y, x = valid.cumsum(dim=1), valid.cumsum(dim=2)
    y = y / (y[:, -1:, :] + 1e-6) * (2 * math.pi)
    x = x / (x[:, :, -1:] + 1e-6) * (2 * math.pi)
    return torch.cat([_sine(angle, embed_dim // 2, _MAP_TEMPERATURE) for angle in (y, x)], dim=-1)


def box_encoding(boxes: Tensor, embed_dim: int) -> Tensor:
    """Sine encoding of boxes (..., 4), (cx, cy, w, h): (..., 2 * embed_dim), features in the order y, x, w, h."""
    angles = boxes * (2 * math.pi)
    return torch.cat([_sine(angles[..., k], embed_dim // 2, _BOX_TEMPERATURE) for k in (1, 0, 2, 3)], dim=-1)


def _sine(angles: Tensor, num_features: int, temperature: float) -> Tensor:
    """Sine and cosine in turns, of `num_features` / 2 frequencies."""
    pair = torch.arange(0, num_features, 2, device=angles.device, dtype=angles.dtype)
    angles = angles[..., None] / temperature ** (pair / num_features)
    return torch.stack((angles.sin(), angles.cos()), dim=-1).flatten(-2)
