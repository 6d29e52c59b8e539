"""Image classification data: folders of classes, timm's augmentations, the evaluator."""

from .evaluation import TopKEvaluator
from .folders import folder_categories, get_test_dicts, get_train_dicts
from .mapper import ClassificationMapper

__all__ = ["ClassificationMapper", "TopKEvaluator", "folder_categories", "get_test_dicts", "get_train_dicts"]
