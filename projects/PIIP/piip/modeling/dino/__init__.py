"""DINO (Zhang et al., 2022) on the project's own deformable attention."""

from .criterion import DINOCriterion, HungarianMatcher
from .denoising import ContrastiveDenoising
from .detector import DINO
from .transformer import DINOTransformer

__all__ = ["DINO", "ContrastiveDenoising", "DINOCriterion", "DINOTransformer", "HungarianMatcher"]
