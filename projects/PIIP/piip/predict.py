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
from torch import Tensor

from piip.checkpointer import find_weights, follow_published, read_categories
from piip.data import Category, coco_categories
from piip.data.label_maps import label_classes
from piip.data.transforms import as_input
from piip.fitting import load_trained
from piip.lazy_config import check_device, data_kind, skip_pretrained
from piip.modeling.classifier import ImageClassifier
from piip.tiles import detect_in_tiles
from piip_core import prepare_for_inference

Task = Literal["detection", "segmentation", "classification"]

logger = logging.getLogger(__name__)


class Predictor:
    """A detector, segmentor or classifier ready for images: model, weights and the configuration's test-time transform.

    Args:
        cfg: LazyConfig with model, dataloader.test.mapper and train.device; it is changed (`data.num_classes`, and
            `model.config` for a published classifier, see `follow_published`).
        weights: Checkpoint, `.pth` or `.safetensors`, or the name of a released model, see `piip_core.zoo.released`;
            every weight of the model must be in it.
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
        weights = find_weights(weights)
        follow_published(cfg, weights)
        self.categories = find_categories(cfg, weights, class_names)
        if self.categories and data_kind(cfg) is not None:
            cfg.data.num_classes = len(self.categories)
        skip_pretrained(cfg)
        cfg.train.device = self.device
        self.model = load_trained(cfg, weights).eval()
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
        if self.task == "segmentation":
            palette = colormap(rgb=True).astype(int).tolist()
            count = len(self.categories) or self.model.sem_seg_head.num_classes
            self.metadata.stuff_classes = [self.category(index).name for index in range(count)]
            self.metadata.stuff_colors = [palette[index % len(palette)] for index in range(count)]
        elif self.categories:
            self.metadata.thing_classes = [category.name for category in self.categories]

    def __call__(self, image: np.ndarray, *, min_score: float = 0.0, tiles: int | None = None) -> Instances:
        """Detects the objects of one image (H, W, 3), uint8 RGB.

        Args:
            image: The image.
            min_score: Lowest score of a detection.
            tiles: Side of tiles in which it is looked at, too, in pixels; see `piip.tiles`.

        Returns:
            Detections with scores of at least `min_score` on the CPU, in pixels of `image`: pred_boxes, scores,
            pred_classes and, with a mask head, pred_masks (N, H, W) bool.

        Raises:
            ValueError: If the image is not as described, or the model is no detector.
            UserError: With `tiles`, without the package sahi.
        """
        if tiles is not None:
            return detect_in_tiles(self, image, tiles, min_score=min_score)
        instances = self._outputs(image, "detection")["instances"].to("cpu")
        return instances[instances.scores >= min_score]

    def segment(self, image: np.ndarray) -> np.ndarray:
        """Finds the class of every pixel of one image (H, W, 3), uint8 RGB.

        Returns:
            Classes (H, W) int64, numbered as in the model.

        Raises:
            ValueError: If the image is not as described, or the model is no segmentor.
        """
        return self._outputs(image, "segmentation")["sem_seg"].argmax(dim=0).cpu().numpy()

    def classify(self, image: np.ndarray, *, top: int = 5) -> list[tuple[int, float]]:
        """Finds the `top` best classes of one image (H, W, 3), uint8 RGB, or all if they are fewer.

        Returns:
            Class, numbered as in the model, and score from 0 to 1 (softmax over all classes), best first.

        Raises:
            ValueError: If the image is not as described, or the model is no classifier.
        """
        scores = self._outputs(image, "classification")["scores"].softmax(dim=0).cpu()
        best = scores.topk(min(top, len(scores)))
        return list(zip(best.indices.tolist(), best.values.tolist(), strict=True))

    @torch.no_grad()
    def _outputs(self, image: np.ndarray, task: Task) -> dict[str, Any]:
        if self.task != task:
            name = {"detection": "", "segmentation": ".segment", "classification": ".classify"}[self.task]
            raise ValueError(f"the model is for {self.task}: call predictor{name}(image)")
        # The model moves the image to its device, normalises and pads it
        return self.model([{"image": self.to_input(image), "height": image.shape[0], "width": image.shape[1]}])[0]

    def to_input(self, image: np.ndarray) -> Tensor:
        """What the model takes for one image (H, W, 3), uint8 RGB: resized, as the configuration says.

        Raises:
            ValueError: If the image is not as described.
        """
        if image.ndim != 3 or image.shape[2] != 3 or not image.size or image.dtype != np.uint8:
            raise ValueError(f"image of shape {image.shape}, {image.dtype}: expected (H, W, 3) uint8")
        if self._image_format == "BGR":
            image = np.ascontiguousarray(image[:, :, ::-1])
        if self.task == "classification":
            return torch.as_tensor(self._transform(Image.fromarray(image)))
        inputs = AugInput(image)
        self._transform(inputs)
        return as_input(inputs.image)

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
    if class_names and kind == "label_maps":
        return label_classes(list(class_names), data.get("reduce_zero_label")).categories
    if class_names:
        known = tuple(Category(k, name) for k, name in enumerate(class_names, start=int(kind != "class_folders")))
    else:
        known = read_categories(weights) or _configured_categories(kind, data)
    if not known:
        logger.warning("Class names are unknown: neither the checkpoint nor the data give them; --class-names does")
    if kind != "class_folders":
        return known
    words = ImageNetInfo("imagenet-22k").label_descriptions(as_dict=True)
    words |= ImageNetInfo().label_descriptions(as_dict=True)
    return tuple(Category(k, words.get(category.name, category.name)) for k, category in enumerate(known))


def _configured_categories(kind: str | None, data: DictConfig | dict[str, Any]) -> tuple[Category, ...]:
    """Classes of the data of a configuration, as far as they can be known without the training images."""
    imagenet, count = ImageNetInfo(), data.get("num_classes")
    if kind == "class_folders":
        names = imagenet.label_names() if count == imagenet.num_classes() else []
        return tuple(Category(k, name) for k, name in enumerate(names))
    if kind == "label_maps":
        return label_classes(data.classes, data.get("reduce_zero_label")).categories
    for part in ("test", "train"):
        path = data.get(part, {}).get("annotations")
        if path and os.path.isfile(path):
            return coco_categories(path)
    builtin = MetadataCatalog.get(data.names_from) if data.get("names_from") in MetadataCatalog.list() else Metadata()
    names = builtin.get("thing_classes", [])
    if len(names) != count:
        return ()
    ids = {k: i for i, k in builtin.get("thing_dataset_id_to_contiguous_id", {}).items()}
    return tuple(Category(ids.get(k, k), name) for k, name in enumerate(names))
