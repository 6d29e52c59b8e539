"""Predictions for single images from a LazyConfig and a checkpoint."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from detectron2.config import instantiate
from detectron2.data import MetadataCatalog
from detectron2.data.catalog import Metadata
from detectron2.data.transforms import AugInput, AugmentationList
from detectron2.evaluation.coco_evaluation import instances_to_coco_json
from detectron2.modeling import SemanticSegmentor
from detectron2.structures import Instances
from detectron2.utils.colormap import colormap
from omegaconf import DictConfig

from piip.checkpointer import AtomicCheckpointer, read_categories
from piip.data import Category, coco_categories
from piip.data.segmentation import label_classes
from piip.lazy_config import check_device, skip_pretrained

__all__ = ["Predictor", "find_categories"]

logger = logging.getLogger(__name__)


class Predictor:
    """A detector or segmentor ready for images: model, weights and the configuration's own test-time transform.

    Args:
        cfg: LazyConfig with model, dataloader.test.mapper and train.device; it is changed (`data.num_classes`).
        weights: Checkpoint, `.pth` or `.safetensors`; every weight of the model must be in it.
        device: Where to run; `train.device` by default.
        class_names: Names of the classes, if checkpoint and annotation files do not give them.

    Attributes:
        categories (tuple[Category, ...]): class k of the model is entry k; empty if unknown.
        metadata (Metadata): names and, for a segmentor, colours, for Detectron2's visualizers.
        segments (bool): whether the model is a semantic segmentor: call `segment` then, else the predictor itself.

    Raises:
        CheckpointError: If the checkpoint is missing, broken or of another model.
        ConfigError: If the device is not there.
    """

    def __init__(
        self, cfg: DictConfig, weights: str, *, device: str | None = None, class_names: Sequence[str] | None = None
    ) -> None:
        self.device = check_device(device or cfg.train.device)
        self.categories = find_categories(cfg, weights, class_names)
        if self.categories and "num_classes" in cfg.get("data", {}):
            cfg.data.num_classes = len(self.categories)
        skip_pretrained(cfg)
        self.model = instantiate(cfg.model).to(self.device).eval()
        AtomicCheckpointer(self.model, strict=True).load(weights, checkpointables=[])
        mapper = cfg.dataloader.test.mapper
        self._augmentations = AugmentationList(instantiate(mapper.augmentations))
        self._image_format = mapper.image_format
        self.segments = isinstance(self.model, SemanticSegmentor)
        self.metadata = Metadata(name="predictor")
        names = [category.name for category in self.categories]
        if self.segments:
            palette = colormap(rgb=True).astype(int).tolist()
            count = len(names) or self.model.sem_seg_head.num_classes
            self.metadata.stuff_classes = names or [self.category(index).name for index in range(count)]
            self.metadata.stuff_colors = [palette[index % len(palette)] for index in range(count)]
        elif names:
            self.metadata.thing_classes = names

    def __call__(self, image: np.ndarray, *, image_format: str = "RGB", min_score: float = 0.0) -> Instances:
        """Detects the objects of one image.

        Args:
            image: (H, W, 3) uint8.
            image_format: Its channel order, "RGB" or "BGR".
            min_score: Detections with lower scores are left out.

        Returns:
            Detections on the CPU, in pixels of `image`: pred_boxes, scores, pred_classes and, with a mask head,
            pred_masks (N, H, W) bool.

        Raises:
            ValueError: If image or format are not as described, or the model is a segmentor.
        """
        if self.segments:
            raise ValueError("the model is a semantic segmentor: call predictor.segment(image)")
        instances = self._outputs(image, image_format)["instances"].to("cpu")
        return instances[instances.scores >= min_score]

    def segment(self, image: np.ndarray, *, image_format: str = "RGB") -> np.ndarray:
        """Finds the class of every pixel of one image.

        Args:
            image: (H, W, 3) uint8.
            image_format: Its channel order, "RGB" or "BGR".

        Returns:
            Classes (H, W) int64, numbered as in the model.

        Raises:
            ValueError: If image or format are not as described, or the model is a detector.
        """
        if not self.segments:
            raise ValueError("the model is a detector: call predictor(image)")
        return self._outputs(image, image_format)["sem_seg"].argmax(dim=0).cpu().numpy()

    @torch.no_grad()
    def _outputs(self, image: np.ndarray, image_format: str) -> dict[str, Any]:
        if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8:
            raise ValueError(f"image of shape {image.shape}, {image.dtype}: expected (H, W, 3) uint8")
        if image_format not in ("RGB", "BGR"):
            raise ValueError(f"image_format={image_format!r}: expected 'RGB' or 'BGR'")
        height, width = image.shape[:2]
        inputs = AugInput(image if image_format == self._image_format else image[:, :, ::-1])
        self._augmentations(inputs)
        tensor = torch.as_tensor(np.ascontiguousarray(inputs.image.transpose(2, 0, 1)))
        # The model moves the image to its device, normalises and pads it
        return self.model([{"image": tensor, "height": height, "width": width}])[0]

    def category(self, index: int) -> Category:
        """Dataset id and name of class `index` of the model."""
        return self.categories[index] if self.categories else Category(index, f"class {index}")

    def to_coco(self, instances: Instances, image_id: int) -> list[dict[str, Any]]:
        """Detections in COCO's result format, with the category's name added."""
        results = instances_to_coco_json(instances, image_id)
        for result in results:
            category = self.category(result["category_id"])
            result.update(category_id=category.id, category_name=category.name)
        return results


def find_categories(cfg: DictConfig, weights: str, class_names: Sequence[str] | None = None) -> tuple[Category, ...]:
    """Classes of a model: as given, or from the checkpoint, the configuration's data, Detectron2's data sets.

    Args:
        cfg: LazyConfig; `data.classes` of label maps or an annotation file gives the classes of its data,
            `data.names_from` names the data set of Detectron2 to fall back on.
        weights: Checkpoint; those of this project's training tool hold their classes.
        class_names: Names in the order of the model's classes.

    Returns:
        The classes, or nothing if they cannot be known.
    """
    data = cfg.get("data", {})
    if class_names and "classes" in data:
        return label_classes(list(class_names), data.get("reduce_zero_label")).categories
    if class_names:
        return tuple(Category(index, name) for index, name in enumerate(class_names, start=1))
    categories = read_categories(weights)
    if categories:
        return categories
    if "classes" in data:  # label maps
        return label_classes(data.classes, data.get("reduce_zero_label")).categories
    for part in ("test", "train"):
        path = data.get(part, {}).get("annotations")
        if path and os.path.isfile(path):
            return coco_categories(path)
    builtin = MetadataCatalog.get(data.names_from) if data.get("names_from") in MetadataCatalog.list() else Metadata()
    names = builtin.get("thing_classes", [])
    if names and len(names) == data.get("num_classes"):
        ids = {k: i for i, k in builtin.get("thing_dataset_id_to_contiguous_id", {}).items()}
        return tuple(Category(ids.get(k, k), name) for k, name in enumerate(names))
    logger.warning("Class names are unknown: neither the checkpoint nor an annotation file gives them")
    return ()
