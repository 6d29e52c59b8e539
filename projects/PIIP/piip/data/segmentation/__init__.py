"""Semantic segmentation data: folders of images and label maps, the published augmentations, the evaluator."""

from .augmentations import PhotometricDistortion, PhotometricTransform, RatioRangeResize
from .classes import IGNORE_LABEL, LabelClasses, label_classes
from .evaluation import build_sem_seg_evaluator
from .folders import find_pairs, get_sem_seg_dicts
from .label_maps import read_label_map
from .mapper import SemSegDatasetMapper

__all__ = [
    "IGNORE_LABEL",
    "LabelClasses",
    "PhotometricDistortion",
    "PhotometricTransform",
    "RatioRangeResize",
    "SemSegDatasetMapper",
    "build_sem_seg_evaluator",
    "find_pairs",
    "get_sem_seg_dicts",
    "label_classes",
    "read_label_map",
]
