"""Mask R-CNN and Cascade Mask R-CNN by MMDetection's rules, those of the published detectors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from detectron2 import model_zoo
from detectron2.config import LazyCall, configurable
from detectron2.modeling.box_regression import Box2BoxTransform
from detectron2.modeling.matcher import Matcher
from detectron2.modeling.proposal_generator import RPN
from detectron2.modeling.roi_heads import CascadeROIHeads, select_foreground_proposals
from detectron2.modeling.roi_heads.fast_rcnn import fast_rcnn_inference
from detectron2.modeling.roi_heads.mask_head import mask_rcnn_inference
from detectron2.structures import Boxes, ImageList, Instances
from detectron2.utils.events import get_event_storage
from omegaconf import DictConfig
from torch import Tensor, nn

CASCADE_STDS = ((0.1, 0.1, 0.2, 0.2), (0.05, 0.05, 0.1, 0.1), (0.033, 0.033, 0.067, 0.067))
"""Standard deviations of the box deltas in the three published cascade stages (Detectron2 rounds the third to 1/30)."""


class TwoSidedBox2BoxTransform(Box2BoxTransform):
    """Detectron2's box coding, but a predicted side is also kept from shrinking by more than the clamp.

    Detectron2 limits growth alone (factor 1000/16), so a side predicted more than 62 times smaller than its anchor
    decodes to another box than in the published detectors.
    """

    def apply_deltas(self, deltas: Tensor, boxes: Tensor) -> Tensor:
        """Decodes (N, k*4) deltas against (N, 4) boxes; same shape as `deltas`, float32."""
        deltas = deltas.float()
        coded = deltas.unflatten(1, (-1, 4))
        limit = coded.new_tensor([float("inf"), float("inf"), *(self.scale_clamp * w for w in self.weights[2:])])
        return super().apply_deltas(coded.maximum(-limit).flatten(1), boxes)


def weights_from_stds(stds: Sequence[float]) -> tuple[float, ...]:
    """Detectron2's weights for the standard deviations in which published configs express them."""
    return tuple(1.0 / std for std in stds)


class BestBoxMatcher(Matcher):
    """Detectron2's matcher with MMDetection's rule for ground truth that no box overlaps enough.

    Every ground truth, in order, takes all boxes with which it has its best IoU, if that is at least `min_quality`,
    from whichever ground truth they were matched with before. Detectron2's own rule has no minimum and leaves them
    matched with the ground truth they overlap most.

    Args:
        thresholds (list[float]): limits between the levels of IoU.
        labels (list[int]): label of each level: 1 for positive, 0 negative, -1 ignored.
        min_quality (float): least best IoU with which a ground truth takes its best boxes; None turns this off.
    """

    def __init__(self, thresholds: Sequence[float], labels: Sequence[int], min_quality: float | None) -> None:
        super().__init__(list(thresholds), list(labels), allow_low_quality_matches=False)
        self.min_quality = min_quality

    def __call__(self, match_quality_matrix: Tensor) -> tuple[Tensor, Tensor]:
        """Matches a (M, N) IoU matrix: indices of ground truth (N,) int64 and labels (N,) int8."""
        matches, labels = super().__call__(match_quality_matrix)
        if self.min_quality is None or match_quality_matrix.numel() == 0:
            return matches, labels
        best = match_quality_matrix.amax(dim=1, keepdim=True)
        taken = (match_quality_matrix == best) & (best >= self.min_quality)
        number = torch.arange(1, len(taken) + 1, device=taken.device)[:, None]
        last = (taken * number).amax(dim=0)  # number, from 1, of the last ground truth that takes the box
        matches = torch.where(last > 0, last - 1, matches)
        labels[last > 0] = 1
        return matches, labels


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

        `padded_sizes` are height and width to which each image would be padded alone, if `pad_divisor` does not say it.
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


class PublishedCascadeROIHeads(CascadeROIHeads):
    """Detectron2's cascade heads with the scores, masks and training of MMDetection.

    - Scores are the softmax of the stages' mean logits; Detectron2 averages their softmaxes.
    - Every stage has its mask head, and their probabilities are averaged; Detectron2 has one.
    - In training every stage matches, adds the ground truth and samples anew, and its losses have its weight;
      Detectron2 samples once and scales gradients instead.

    Args:
        mask_heads (list[nn.Module]): mask head of each stage.
        stage_loss_weights (list[float]): factor of all losses of each stage.
        kwargs: as for `CascadeROIHeads`, without `mask_head`.
    """

    @configurable
    def __init__(self, *, mask_heads: list[nn.Module], stage_loss_weights: Sequence[float], **kwargs: Any) -> None:
        super().__init__(mask_head=nn.ModuleList(mask_heads), **kwargs)
        self.stage_loss_weights = tuple(stage_loss_weights)
        counts = {"mask_heads": len(mask_heads), "stage_loss_weights": len(self.stage_loss_weights)}
        for name, count in counts.items():
            if count != self.num_cascade_stages:
                raise ValueError(f"{count} {name}: expected {self.num_cascade_stages}, one per stage")

    def forward(
        self,
        images: ImageList,
        features: dict[str, Tensor],
        proposals: list[Instances],
        targets: list[Instances] | None = None,
    ) -> tuple[list[Instances], dict[str, Tensor]]:
        """As in `ROIHeads`: sampled proposals of the last stage and losses, or detections and an empty dictionary."""
        if not self.training:
            return self.forward_with_given_boxes(features, self.detect(features, proposals)), {}
        losses: dict[str, Tensor] = {}
        maps = [features[name] for name in self.box_in_features]
        for stage, weight in enumerate(self.stage_loss_weights):
            with get_event_storage().name_scope(f"stage{stage}"):
                sampled = self._sample(proposals, targets, stage)
                predictions = self._predict(maps, sampled, stage)
                found = self.box_predictor[stage].losses(predictions, sampled)
                found |= self._mask_losses(features, sampled, stage)
            losses |= {f"{name}_stage{stage}": loss * weight for name, loss in found.items()}
            proposals = self.refine(predictions, sampled, stage)
        return sampled, losses

    def _sample(self, proposals: list[Instances], targets: list[Instances], stage: int) -> list[Instances]:
        """Samples of a stage, ground truth boxes among them, with a field that tells those."""
        self.proposal_matcher = self.proposal_matchers[stage]  # the one that the method below asks
        proposals = [_marked(found.proposal_boxes, found.image_size) for found in proposals]
        if self.proposal_append_gt:
            truth = [_marked(target.gt_boxes, target.image_size, truth=True) for target in targets]
            proposals = [Instances.cat(pair) for pair in zip(proposals, truth, strict=True)]
        append, self.proposal_append_gt = self.proposal_append_gt, False
        try:
            return self.label_and_sample_proposals(proposals, targets)
        finally:
            self.proposal_append_gt = append

    def _mask_losses(self, features: dict[str, Tensor], sampled: list[Instances], stage: int) -> dict[str, Tensor]:
        positive, _ = select_foreground_proposals(sampled, self.num_classes)
        maps = [features[name] for name in self.mask_in_features]
        crops = self.mask_pooler(maps, [x.proposal_boxes for x in positive])
        return self.mask_head[stage](crops, positive)

    def refine(self, predictions: tuple[Tensor, Tensor], proposals: list[Instances], stage: int) -> list[Instances]:
        """Boxes of a stage, clipped to the images: proposals of the next one. Ground truth boxes are left out."""
        refined = []
        boxes = self.box_predictor[stage].predict_boxes(predictions, proposals)
        for rows, before in zip(boxes, proposals, strict=True):
            after = Instances(before.image_size, proposal_boxes=Boxes(rows.detach()))
            after.proposal_boxes.clip(before.image_size)
            refined.append(after[~before.is_ground_truth] if before.has("is_ground_truth") else after)
        return refined

    def run_stages(
        self, features: dict[str, Tensor], proposals: list[Instances]
    ) -> list[tuple[list[Instances], tuple[Tensor, Tensor]]]:
        """Proposals and predictions (logits, deltas) of every stage, in inference."""
        maps, stages = [features[name] for name in self.box_in_features], []
        for stage in range(self.num_cascade_stages):
            predictions = self._predict(maps, proposals, stage)
            stages.append((proposals, predictions))
            proposals = self.refine(predictions, proposals, stage)
        return stages

    def _predict(self, features: list[Tensor], proposals: list[Instances], stage: int) -> tuple[Tensor, Tensor]:
        pooled = self.box_pooler(features, [x.proposal_boxes for x in proposals])
        return self.box_predictor[stage](self.box_head[stage](pooled))

    def detect(self, features: dict[str, Tensor], proposals: list[Instances]) -> list[Instances]:
        """Boxes, scores and classes, in inference."""
        stages = self.run_stages(features, proposals)
        logits = torch.stack([predictions[0] for _, predictions in stages]).mean(dim=0)
        predictor, (last, predictions) = self.box_predictor[-1], stages[-1]
        detections, _ = fast_rcnn_inference(
            predictor.predict_boxes(predictions, last),
            list(logits.softmax(dim=-1).split([len(x) for x in last])),
            [x.image_size for x in last],
            predictor.test_score_thresh,
            predictor.test_nms_thresh,
            predictor.test_topk_per_image,
        )
        return detections

    def forward_with_given_boxes(self, features: dict[str, Tensor], instances: list[Instances]) -> list[Instances]:
        """Mean probabilities of the stages' mask heads for detections, in inference."""
        maps = [features[name] for name in self.mask_in_features]
        crops = self.mask_pooler(maps, [x.pred_boxes for x in instances])
        votes = []
        for head in self.mask_head:
            mask_rcnn_inference(head.layers(crops), instances)
            votes.append([x.pred_masks for x in instances])
        for found, masks in zip(instances, zip(*votes, strict=True), strict=True):
            found.pred_masks = torch.stack(masks).mean(dim=0)
        return instances


def _marked(boxes: Boxes, image_size: tuple[int, int], *, truth: bool = False) -> Instances:
    mark = torch.full((len(boxes),), truth, device=boxes.device)
    return Instances(image_size, proposal_boxes=boxes, is_ground_truth=mark)


def published_mask_rcnn() -> DictConfig:
    """LazyConfig node of Mask R-CNN with an FPN by MMDetection's rules; the backbone is still Detectron2's ResNet.

    Detections are those of `common/models/mask_rcnn_fpn.py` except for boxes that shrink more than 62-fold; the
    assignment of ground truth in training is the published one.
    """
    model = model_zoo.get_config("common/models/mask_rcnn_fpn.py").model
    published_rpn(model.proposal_generator)
    roi_heads = model.roi_heads
    roi_heads.proposal_matcher = LazyCall(BestBoxMatcher)(thresholds=[0.5], labels=[0, 1], min_quality=0.5)
    roi_heads.box_predictor.box2box_transform._target_ = TwoSidedBox2BoxTransform
    return model


def published_rpn(rpn: DictConfig) -> DictConfig:
    """Turns a node of Detectron2's RPN into the published one, in place, and returns it."""
    rpn._target_ = PublishedRPN
    rpn.anchor_matcher = LazyCall(BestBoxMatcher)(thresholds=[0.3, 0.7], labels=[0, -1, 1], min_quality=0.3)
    rpn.box2box_transform._target_ = TwoSidedBox2BoxTransform
    return rpn


def published_cascade_mask_rcnn() -> DictConfig:
    """LazyConfig node of MMDetection's Cascade Mask R-CNN; the backbone is still Detectron2's ResNet with an FPN."""
    model = model_zoo.get_config("common/models/cascade_rcnn.py").model
    rpn, roi_heads = published_rpn(model.proposal_generator), model.roi_heads
    rpn.anchor_boundary_thresh = 0
    rpn.smooth_l1_beta = 1 / 9
    rpn.post_nms_topk = (2000, 1000)

    roi_heads._target_ = PublishedCascadeROIHeads
    roi_heads.stage_loss_weights = [1.0, 0.5, 0.25]
    roi_heads.proposal_matchers = [
        LazyCall(Matcher)(thresholds=[iou], labels=[0, 1], allow_low_quality_matches=False) for iou in (0.5, 0.6, 0.7)
    ]
    for predictor, stds in zip(roi_heads.box_predictors, CASCADE_STDS, strict=True):
        predictor.box2box_transform = LazyCall(TwoSidedBox2BoxTransform)(weights=weights_from_stds(stds))
        predictor.smooth_l1_beta = 1.0
    mask_head = roi_heads.pop("mask_head")
    mask_head.num_classes = "${...num_classes}"
    roi_heads.mask_heads = [mask_head for _ in CASCADE_STDS]
    return model
