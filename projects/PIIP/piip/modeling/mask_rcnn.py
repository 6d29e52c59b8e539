"""Detectron2's Mask R-CNN with the rules of MMDetection, of the published detectors, where the two differ."""

from __future__ import annotations

from detectron2 import model_zoo
from detectron2.config import LazyCall
from omegaconf import DictConfig

from .box_regression import TwoSidedBox2BoxTransform
from .matcher import BestBoxMatcher
from .rpn import PublishedRPN

__all__ = ["published_mask_rcnn", "published_rpn"]


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
