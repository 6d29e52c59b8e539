"""Backbones, heads and meta-architectures for Detectron2."""

from .backbone import PIIPFPN, PIIPBackbone
from .cascade_rcnn import published_cascade_mask_rcnn
from .mask_rcnn import published_mask_rcnn

__all__ = ["PIIPFPN", "PIIPBackbone", "published_cascade_mask_rcnn", "published_mask_rcnn"]
