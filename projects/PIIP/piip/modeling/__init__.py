"""Backbones, heads and meta-architectures for Detectron2."""

from .backbone import PIIPFPN, PIIPBackbone

__all__ = ["PIIPFPN", "PIIPBackbone"]
