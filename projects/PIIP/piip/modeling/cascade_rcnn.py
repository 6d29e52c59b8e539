"""Cascade Mask R-CNN by MMDetection's rules, those of the published detectors, where Detectron2's differ."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from detectron2 import model_zoo
from detectron2.config import LazyCall, configurable
from detectron2.modeling.matcher import Matcher
from detectron2.modeling.roi_heads import CascadeROIHeads, select_foreground_proposals
from detectron2.modeling.roi_heads.fast_rcnn import fast_rcnn_inference
from detectron2.modeling.roi_heads.mask_head import mask_rcnn_inference
from detectron2.structures import Boxes, ImageList, Instances
from detectron2.utils.events import get_event_storage
from omegaconf import DictConfig
from torch import Tensor, nn

from .mask_rcnn import CASCADE_STDS, TwoSidedBox2BoxTransform, published_rpn, weights_from_stds


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
