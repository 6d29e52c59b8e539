"""Data of the PIIP detectors: the published image pipeline, COCO-format data sets, reproducible loading."""

from .coco import build_coco_evaluator, get_coco_dicts
from .coco_check import coco_categories
from .dataset import Category, DatasetError
from .images import UnreadableImageError, read_image
from .loader import TrainLoader, build_train_loader
from .mapper import CheckedDatasetMapper
from .multi_scale import MultiScaleCrop
from .transforms import KeepRatioResize, ShortSideResize

__all__ = [
    "Category",
    "CheckedDatasetMapper",
    "DatasetError",
    "KeepRatioResize",
    "MultiScaleCrop",
    "ShortSideResize",
    "TrainLoader",
    "UnreadableImageError",
    "build_coco_evaluator",
    "build_train_loader",
    "coco_categories",
    "get_coco_dicts",
    "read_image",
]
