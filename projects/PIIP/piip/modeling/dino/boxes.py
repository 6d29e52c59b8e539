"""Box arithmetic of DINO: boxes (cx, cy, w, h) relative to the un-padded image, and their logits."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["generalized_iou", "inverse_sigmoid"]

_EPS = 1e-3  # Deformable DETR has 1e-5; DINO's boxes and their noise are meant for this one
_MIN_AREA = 1e-6


def inverse_sigmoid(x: Tensor) -> Tensor:
    """Logit of values in [0, 1], kept finite: neither x nor 1 - x counts as less than 1e-3."""
    x = x.clamp(min=0, max=1)
    return torch.log(x.clamp(min=_EPS) / (1 - x).clamp(min=_EPS))


def generalized_iou(first: Tensor, second: Tensor) -> Tensor:
    """Generalised IoU (Rezatofighi et al., 2019) of boxes (..., 4) with boxes (..., 4), broadcast; (x1, y1, x2, y2).

    Union and enclosing area count as at least 1e-6 square pixels, so boxes without area give no NaN.
    """
    intersection = _area(
        (torch.min(first[..., 2:], second[..., 2:]) - torch.max(first[..., :2], second[..., :2])).clamp(min=0)
    )
    areas = _area(first[..., 2:] - first[..., :2]) + _area(second[..., 2:] - second[..., :2])
    union = (areas - intersection).clamp(min=_MIN_AREA)
    hull = _area((torch.max(first[..., 2:], second[..., 2:]) - torch.min(first[..., :2], second[..., :2])).clamp(min=0))
    hull = hull.clamp(min=_MIN_AREA)
    return intersection / union - (hull - union) / hull


def _area(sides: Tensor) -> Tensor:
    return sides[..., 0] * sides[..., 1]
