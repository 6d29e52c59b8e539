"""Backbones, heads and meta-architectures for Detectron2."""

from .backbone import PIIPFPN, PIIPBackbone, feature_shapes
from .classifier import ImageClassifier
from .flops import register_flop_handles
from .rcnn import published_cascade_mask_rcnn, published_mask_rcnn
from .segmentor import FCNHead, SlidingWindowSegmentor, UperNetHead

__all__ = [
    "FCNHead",
    "ImageClassifier",
    "PIIPBackbone",
    "PIIPFPN",
    "SlidingWindowSegmentor",
    "UperNetHead",
    "feature_shapes",
    "published_cascade_mask_rcnn",
    "published_mask_rcnn",
]

register_flop_handles()
