"""Backbones, heads and meta-architectures for Detectron2."""

from .backbone import PIIPFPN, PIIPBackbone
from .mask_rcnn import published_mask_rcnn

__all__ = ["PIIPFPN", "PIIPBackbone", "published_mask_rcnn"]
