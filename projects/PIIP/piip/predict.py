"""Predictions for single images from a LazyConfig and a checkpoint."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from typing import Any, Literal

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
from PIL import Image
from timm.data import ImageNetInfo

from piip.checkpointer import AtomicCheckpointer, follow_published, read_categories
from piip.data import Category, coco_categories
from piip.data.segmentation import label_classes
from piip.data.transforms import as_input
from piip.lazy_config import check_device, data_kind, skip_pretrained
from piip.modeling.classifier import ImageClassifier
from piip_core import prepare_for_inference

__all__ = ["Predictor", "Task", "find_categories"]

Task = Literal["detection", "segmentation", "classification"]

logger = logging.getLogger(__name__)


class Predictor:
    """A detector, segmentor or classifier ready for images: model, weights and the configuration's test-time transform.

    Args:
        cfg: LazyConfig with model, dataloader.test.mapper and train.device; it is changed (`data.num_classes`, and
            `model.config` for a published classifier, see `follow_published`).
        weights: Checkpoint, `.pth` or `.safetensors`; every weight of the model must be in it.
        device: Where to run; `train.device` by default.
        class_names: Names of the classes, if checkpoint and annotation files do not give them.
        prepare: Make the model faster by `piip_core.prepare_for_inference`; results differ by rounding.

    Attributes:
        categories (tuple[Category, ...]): class k of the model is entry k; empty if unknown.
        metadata (Metadata): names and, for a segmentor, colours, for Detectron2's visualizers.
        task (Task): what the model does: a detector is the predictor itself, `segment` and `classify` are the others.

    Raises:
        CheckpointError: If the checkpoint is missing, broken or of another model.
        ConfigError: If the device is not there, or the checkpoint is that of another published classifier.
        UserError: With `prepare`, if the model has no PIIP inside.
    """

    def __init__(
        self,
        cfg: DictConfig,
        weights: str,
        *,
        device: str | None = None,
        class_names: Sequence[str] | None = None,
        prepare: bool = False,
    ) -> None:
        self.device = check_device(device or cfg.train.device)
        follow_published(cfg, weights)
        self.categories = find_categories(cfg, weights, class_names)
        if self.categories and data_kind(cfg) is not None:
            cfg.data.num_classes = len(self.categories)
        skip_pretrained(cfg)
        self.model = instantiate(cfg.model).to(self.device).eval()
        AtomicCheckpointer(self.model, strict=True).load(weights, checkpointables=[])
        if prepare:
            prepare_for_inference(self.model)
        mapper = cfg.dataloader.test.mapper
        self._image_format = mapper.image_format
        if isinstance(self.model, ImageClassifier):
            self.task: Task = "classification"
            self._transform = instantiate(mapper.transform)
        else:
            self.task = "segmentation" if isinstance(self.model, SemanticSegmentor) else "detection"
            self._transform = AugmentationList(instantiate(mapper.augmentations))
        self.metadata = Metadata(name="predictor")
        names = [category.name for category in self.categories]
        if self.task == "segmentation":
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
            ValueError: If image or format are not as described, or the model is no detector.
        """
        self._check("detection")
        instances = self._outputs(image, image_format)["instances"].to("cpu")
        return instances[instances.scores >= min_score]

    def segment(self, image: np.ndarray, *, image_format: str = "RGB") -> np.ndarray:
        """Finds the class of every pixel of one image; image and format as in a detector's call.

        Returns:
            Classes (H, W) int64, numbered as in the model.

        Raises:
            ValueError: If image or format are not as described, or the model is no segmentor.
        """
        self._check("segmentation")
        return self._outputs(image, image_format)["sem_seg"].argmax(dim=0).cpu().numpy()

    def classify(self, image: np.ndarray, *, image_format: str = "RGB", top: int = 5) -> list[tuple[int, float]]:
        """Finds the `top` best classes of one image, or all if they are fewer; arguments as in a detector's call.

        Returns:
            Class, numbered as in the model, and score from 0 to 1 (softmax over all classes), best first.

        Raises:
            ValueError: If image or format are not as described, or the model is no classifier.
        """
        self._check("classification")
        scores = self._outputs(image, image_format)["scores"].softmax(dim=0).cpu()
        best = scores.topk(min(top, len(scores)))
        return list(zip(best.indices.tolist(), best.values.tolist(), strict=True))

    def _check(self, task: Task) -> None:
        if self.task != task:
            name = {"detection": "", "segmentation": ".segment", "classification": ".classify"}[self.task]
            raise ValueError(f"the model is for {self.task}: call predictor{name}(image)")

    @torch.no_grad()
    def _outputs(self, image: np.ndarray, image_format: str) -> dict[str, Any]:
        if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8:
            raise ValueError(f"image of shape {image.shape}, {image.dtype}: expected (H, W, 3) uint8")
        if image_format not in ("RGB", "BGR"):
            raise ValueError(f"image_format={image_format!r}: expected 'RGB' or 'BGR'")
        height, width = image.shape[:2]
        image = image if image_format == self._image_format else image[:, :, ::-1]
        if self.task == "classification":
            tensor = torch.as_tensor(self._transform(Image.fromarray(np.ascontiguousarray(image))))
        else:
            inputs = AugInput(image)
            self._transform(inputs)
            tensor = as_input(inputs.image)
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
    """Classes of a model: as given, or from the checkpoint, the configuration's data, Detectron2's and timm's lists.

    Args:
        cfg: LazyConfig; `data.classes` of label maps or an annotation file gives the classes of its data,
            `data.names_from` names the data set of Detectron2 to fall back on. A classifier of 1000 classes falls back
            on those of ImageNet-1K, and has words for synsets (n02099601: golden retriever).
        weights: Checkpoint; those of this project's training tool hold their classes.
        class_names: Names in the order of the model's classes.

    Returns:
        The classes, or nothing if they cannot be known.
    """
    kind, data = data_kind(cfg), cfg.get("data", {})
    if kind == "class_folders":
        return _image_classes(data.get("num_classes"), weights, class_names)
    if class_names and kind == "label_maps":
        return label_classes(list(class_names), data.get("reduce_zero_label")).categories
    if class_names:
        return tuple(Category(index, name) for index, name in enumerate(class_names, start=1))
    categories = read_categories(weights)
    if categories:
        return categories
    if kind == "label_maps":
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


def _image_classes(num_classes: int, weights: str, class_names: Sequence[str] | None) -> tuple[Category, ...]:
    """Classes of a classifier; ids are their numbers in the model."""
    imagenet = ImageNetInfo()
    names = list(class_names or [category.name for category in read_categories(weights)])
    if not names and num_classes == imagenet.num_classes():
        names = imagenet.label_names()
    if not names:
        logger.warning("Class names are unknown: the checkpoint does not give them; --class-names does")
    words = ImageNetInfo("imagenet-22k").label_descriptions(as_dict=True) | imagenet.label_descriptions(as_dict=True)
    return tuple(Category(index, words.get(name, name)) for index, name in enumerate(names))
