"""Data of the PIIP detectors: the published image pipeline, COCO-format data sets, reproducible loading."""

from .categories import Category
from .coco import build_coco_evaluator, coco_categories, get_coco_dicts
from .errors import DatasetError
from .images import UnreadableImageError, read_image
from .loader import TrainLoader, build_train_loader
from .mapper import CheckedDatasetMapper
from .multi_scale import MultiScaleCrop
from .pipeline import network_input
from .transforms import (
    KeepRatioResize,
    OpenCVResizeTransform,
    ShortSideResize,
    keep_ratio_size,
    resize_bilinear,
    resize_nearest,
    short_side_size,
)

__all__ = [
    "Category",
    "CheckedDatasetMapper",
    "DatasetError",
    "KeepRatioResize",
    "MultiScaleCrop",
    "OpenCVResizeTransform",
    "ShortSideResize",
    "TrainLoader",
    "UnreadableImageError",
    "build_coco_evaluator",
    "build_train_loader",
    "coco_categories",
    "get_coco_dicts",
    "keep_ratio_size",
    "network_input",
    "read_image",
    "resize_bilinear",
    "resize_nearest",
    "short_side_size",
]
