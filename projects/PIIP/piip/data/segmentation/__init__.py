"""Semantic segmentation data: folders of images and label maps, the published augmentations, the evaluator."""

from .augmentations import PhotometricDistortion, RatioRangeResize
from .classes import IGNORE_LABEL, label_classes
from .evaluation import build_sem_seg_evaluator
from .folders import get_sem_seg_dicts
from .mapper import SemSegDatasetMapper

__all__ = [
    "IGNORE_LABEL",
    "PhotometricDistortion",
    "RatioRangeResize",
    "SemSegDatasetMapper",
    "build_sem_seg_evaluator",
    "get_sem_seg_dicts",
    "label_classes",
]
