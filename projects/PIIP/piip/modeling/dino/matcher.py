"""One-to-one matching of predictions with ground truth."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from torchvision.ops import box_convert

from .boxes import Target, generalized_iou

__all__ = ["HungarianMatcher"]

_EPS = 1e-12


class HungarianMatcher:
    """Finds the assignment of least total cost: focal cost of the class, L1 distance, and generalised IoU in pixels.

    Args:
        class_weight: factor of the focal cost.
        box_weight: factor of the L1 distance of (cx, cy, w, h), relative to the image.
        giou_weight: factor of the generalised IoU.
        alpha: balance of the focal cost.
        gamma: its exponent.
    """

    def __init__(
        self,
        class_weight: float = 2.0,
        box_weight: float = 5.0,
        giou_weight: float = 2.0,
        alpha: float = 0.25,
        gamma: float = 2.0,
    ) -> None:
        self.class_weight, self.box_weight, self.giou_weight = class_weight, box_weight, giou_weight
        self.alpha, self.gamma = alpha, gamma

    def cost(self, class_logits: Tensor, boxes: Tensor, target: Target) -> Tensor:
        """Costs (..., Q, N) of all pairs of predictions and ground truth of one image.

        Predictions are class logits (..., Q, num_classes) and boxes (..., Q, 4) as (cx, cy, w, h).
        """
        score = class_logits.sigmoid()[..., target.labels]
        positive = self.alpha * (1 - score) ** self.gamma * -(score + _EPS).log()
        negative = (1 - self.alpha) * score**self.gamma * -(1 - score + _EPS).log()
        distance = torch.cdist(boxes, target.boxes.expand(*boxes.shape[:-2], -1, -1), p=1)
        pixels = box_convert(boxes, "cxcywh", "xyxy") * target.scale
        giou = generalized_iou(pixels[..., None, :], target.pixel_boxes)
        return self.class_weight * (positive - negative) + self.box_weight * distance - self.giou_weight * giou

    @torch.no_grad()
    def __call__(
        self, class_logits: Tensor, boxes: Tensor, targets: Sequence[Target]
    ) -> list[list[tuple[Tensor, Tensor]]]:
        """Matches every layer for itself.

        Args:
            class_logits: (layers, B, Q, num_classes).
            boxes: (layers, B, Q, 4) as (cx, cy, w, h).
            targets: Ground truth of the B images.

        Returns:
            For every layer and image, indices of the matched queries and of their boxes, min(Q, N) each, on the CPU.

        Raises:
            FloatingPointError: If predictions are not finite.
        """
        found: list[list[tuple[Tensor, Tensor]]] = [[] for _ in class_logits]
        for image, target in enumerate(targets):
            costs = self.cost(class_logits[:, image], boxes[:, image], target).cpu()
            if not costs.isfinite().all():
                raise FloatingPointError(
                    "DINO's predictions are not finite, so they cannot be matched: training diverged. Lower the "
                    "learning rate, or clip gradients (train.clip_norm)"
                )
            for layer, cost in zip(found, costs, strict=True):
                queries, rows = linear_sum_assignment(cost.numpy())
                layer.append((torch.from_numpy(queries), torch.from_numpy(rows)))
        return found
