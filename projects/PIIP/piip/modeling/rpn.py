"""Region proposals trained by MMDetection's rules, those of the published detectors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from detectron2.modeling.proposal_generator import RPN
from detectron2.structures import Boxes, Instances
from torch import Tensor

__all__ = ["PublishedRPN"]


class PublishedRPN(RPN):
    """Detectron2's RPN trained by MMDetection's rules: proposals are the same, two details of the training differ.

    Anchors that take no part are left out before the matching and not after it, so they cannot be a ground truth's
    best anchor: those that cross the image border (if `anchor_boundary_thresh` is not negative), and those of cells
    in the padding that only other images of the batch needed. The losses are divided by the number of anchors that
    were sampled, which is less than `batch_size_per_image` per image where there are too few.

    Args:
        pad_divisor (int): multiple to which an image alone would be padded; None counts no cell as padding.
        kwargs: of `RPN`.
    """

    def __init__(self, *, pad_divisor: int | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.pad_divisor = pad_divisor

    def considered_anchors(self, anchors: Boxes, image_size: Sequence[int], padded_size: Sequence[int]) -> Tensor:
        """Which anchors take part in training on an image of `image_size` that alone would be padded to `padded_size`.

        Sizes are height and width; the result is (number of anchors,) bool.
        """
        height, width = padded_size
        # centres are corners of cells, at multiples of the stride: half a pixel guards against rounding
        centres = anchors.get_centers() + 0.5
        considered = (centres[:, 0] < width) & (centres[:, 1] < height)
        if self.anchor_boundary_thresh >= 0:
            considered &= anchors.inside_box(tuple(image_size), self.anchor_boundary_thresh)
        return considered

    @torch.no_grad()
    def label_and_sample_anchors(
        self,
        anchors: list[Boxes],
        gt_instances: list[Instances],
        padded_sizes: Sequence[Sequence[int]] | None = None,
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Labels (1, 0, -1 for unused) and matched boxes for every anchor of every image; see `RPN`.

        Args:
            anchors: One `Boxes` per level.
            gt_instances: One per image, with `gt_boxes`.
            padded_sizes: Height and width to which each image would be padded alone; None computes them.
        """
        every = Boxes.cat(anchors)
        if padded_sizes is None:
            padded_sizes = [self._padded(x.image_size) for x in gt_instances]
        labels, matched = [], []
        for instances, padded in zip(gt_instances, padded_sizes, strict=True):
            considered = self.considered_anchors(every, instances.image_size, padded)
            (some_labels,), (some_boxes,) = super().label_and_sample_anchors([every[considered]], [instances])
            all_labels = some_labels.new_full((len(every),), -1)
            all_boxes = torch.zeros_like(every.tensor)
            all_labels[considered], all_boxes[considered] = some_labels, some_boxes
            labels.append(all_labels)
            matched.append(all_boxes)
        return labels, matched

    def _padded(self, size: Sequence[int]) -> tuple[float, ...]:
        if self.pad_divisor is None:
            return (float("inf"),) * 2
        return tuple(-(-side // self.pad_divisor) * self.pad_divisor for side in size)

    def losses(
        self,
        anchors: list[Boxes],
        pred_objectness_logits: list[Tensor],
        gt_labels: list[Tensor],
        pred_anchor_deltas: list[Tensor],
        gt_boxes: list[Tensor],
    ) -> dict[str, Tensor]:
        """Objectness and box losses over the number of sampled anchors; see `RPN`."""
        losses = super().losses(anchors, pred_objectness_logits, gt_labels, pred_anchor_deltas, gt_boxes)
        sampled = sum((labels >= 0).sum() for labels in gt_labels).clamp(min=1)
        return {name: loss * (self.batch_size_per_image * len(gt_labels) / sampled) for name, loss in losses.items()}
