"""Data of the PIIP detectors: the published image pipeline, COCO-format data sets, reproducible loading."""

from piip_core.images import UnreadableImageError

from .coco import build_coco_evaluator, coco_categories, get_coco_dicts
from .dataset import Category, DatasetError, read_image
from .loader import TrainLoader, build_train_loader
from .mapper import CheckedDatasetMapper
from .transforms import KeepRatioResize, MultiScaleCrop, PhotometricDistortion

__all__ = [
    "Category",
    "CheckedDatasetMapper",
    "DatasetError",
    "KeepRatioResize",
    "MultiScaleCrop",
    "PhotometricDistortion",
    "TrainLoader",
    "UnreadableImageError",
    "build_coco_evaluator",
    "build_train_loader",
    "coco_categories",
    "get_coco_dicts",
    "read_image",
]
