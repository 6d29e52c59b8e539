"""Boxes of DINO: (cx, cy, w, h) relative to the un-padded image, their logits, and ground truth in that form."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from detectron2.structures import Instances
from torch import Tensor
from torchvision.ops import box_convert

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
