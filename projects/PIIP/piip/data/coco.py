"""COCO-format data sets as LazyConfig nodes: any annotation file and image folder, no registration by hand."""

from __future__ import annotations

import json
import logging
import os
import tempfile
import weakref
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from detectron2.data import MetadataCatalog
from detectron2.data.build import filter_images_with_only_crowd_annotations
from detectron2.data.catalog import Metadata
from detectron2.evaluation import COCOEvaluator
from detectron2.structures import BoxMode

from .coco_check import CocoFile, check_images_exist, load_coco
from .dataset import DatasetError, Findings, check_num_classes, first_few
from .masks import compressed

__all__ = ["build_coco_evaluator", "get_coco_dicts"]

logger = logging.getLogger(__name__)


def get_coco_dicts(
    annotations: str,
    images: str,
    *,
    num_classes: int | None = None,
    filter_empty: bool = True,
    min_image_side: int = 0,
    drop_boxes: bool = True,
    require_masks: bool = False,
) -> list[dict[str, Any]]:
    """Loads a COCO-format data set in Detectron2's standard form, after checking it.

    Args:
        annotations: COCO-format JSON file. Category ids need not be contiguous.
        images: Folder that the file names in it are relative to.
        num_classes: If given, the number of categories that the file must have.
        filter_empty: Leave out images without a usable, non-crowd annotation.
        min_image_side: Leave out images whose shorter side is less.
        drop_boxes: Leave out boxes without a usable area inside the image (published training rule).
        require_masks: Every non-crowd annotation must have a segmentation.

    Returns:
        One dict per image, category ids in 0 .. num_classes - 1, in the order of the image ids.

    Raises:
        DatasetError: If a path is wrong, the file is broken, a reference inside it does not exist, an image is
            missing, the number of classes differs, or nothing is left after the filters.
    """
    file = load_coco(annotations, training=drop_boxes, require_annotations=filter_empty, require_masks=require_masks)
    check_images_exist(file.data, annotations, images)
    check_num_classes(len(file.categories), f"{annotations}: {len(file.categories)} categories", num_classes)
    dicts = _standard_dicts(file, images)
    total = len(dicts)
    dicts = [record for record in dicts if min(record["height"], record["width"]) >= min_image_side]
    if len(dicts) < total:
        logger.info("Removed %d images with a side below %d pixels", total - len(dicts), min_image_side)
    if filter_empty:
        dicts = filter_images_with_only_crowd_annotations(dicts)
    if not dicts:
        raise DatasetError(
            f"{annotations}: none of its {total} images is left: expected images with a shorter side of at least "
            f"{min_image_side} pixels" + (" and at least one usable, non-crowd annotation" if filter_empty else "")
        )
    return dicts


def _standard_dicts(file: CocoFile, images: str) -> list[dict[str, Any]]:
    """A checked file in Detectron2's standard form, in the order of the image ids."""
    classes = {category.id: k for k, category in enumerate(file.categories)}
    dicts = []
    for image in sorted(file.data["images"], key=lambda image: image["id"]):
        record = {"file_name": os.path.join(images, image["file_name"]), "image_id": image["id"]}
        record |= {key: image[key] for key in ("height", "width")}
        record["annotations"] = [_standard_annotation(a, classes) for a in file.annotations[image["id"]]]
        dicts.append(record)
    return dicts


def _standard_annotation(annotation: dict[str, Any], classes: dict[int, int]) -> dict[str, Any]:
    found = {key: annotation[key] for key in ("iscrowd", "bbox")}
    found |= {"bbox_mode": BoxMode.XYWH_ABS, "category_id": classes[annotation["category_id"]]}
    mask = annotation.get("segmentation")
    if mask:
        found["segmentation"] = compressed(mask) if isinstance(mask, dict) else mask
    return found


class _Evaluator(COCOEvaluator):
    """Says beside the numbers which classes are not in them."""

    unseen = ""

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """As `COCOEvaluator`."""
        results = super().evaluate(*args, **kwargs)
        if results and self.unseen:
            logger.warning("AP is NaN for categories without an object, and the mean of the others: %s", self.unseen)
        return results


def build_coco_evaluator(
    annotations: str,
    *,
    output_dir: str | None = None,
    tasks: Sequence[str] | None = None,
    require_masks: bool | None = None,
    **kwargs: Any,
) -> COCOEvaluator:
    """Detectron2's COCO evaluator for an annotation file, checked and mended as for training.

    Args:
        annotations: COCO-format JSON file with the ground truth.
        output_dir: Folder for the detections in COCO's result format; None writes nothing.
        tasks: "bbox" and "segm", or one of them; by default what the predictions hold, or boxes alone if
            `require_masks` is False and an object has no mask.
        require_masks: Whether every object must have a mask. None: if `tasks` say so, or any object has one.
        kwargs: Other arguments of `COCOEvaluator`.

    Raises:
        DatasetError: If the file cannot be used.
    """
    if require_masks is None and tasks is not None:
        require_masks = "segm" in tasks
    file = load_coco(annotations, training=False, require_annotations=False, require_masks=require_masks)
    objects = [annotation for group in file.annotations.values() for annotation in group]
    if tasks is None and not all("segmentation" in annotation for annotation in objects):
        tasks = ("bbox",)
    _warn_of_crowded_images(file, kwargs.get("max_dets_per_image") or 100)
    json_file, folder = annotations, None
    if file.mended:  # the evaluator takes nothing but a file
        folder = tempfile.TemporaryDirectory(prefix="piip_")
        json_file = os.path.join(folder.name, "ground_truth.json")
        Path(json_file).write_text(json.dumps(file.data))
    evaluator = _Evaluator(_metadata(file, json_file).name, tasks=tasks, output_dir=output_dir, **kwargs)
    evaluator.unseen = first_few([f"{category.name} (id {category.id})" for category in file.unseen])
    if folder:
        weakref.finalize(evaluator, folder.cleanup)
    return evaluator


def _warn_of_crowded_images(file: CocoFile, limit: int) -> None:
    """COCO's metrics take so many detections of an image and class."""
    found = Findings(file.path)
    for image_id, group in file.annotations.items():
        counts = Counter(annotation["category_id"] for annotation in group if not annotation["iscrowd"])
        for category_id, count in counts.items():
            if count > limit:
                kind = f"groups of objects of an image and category have more than the {limit} that are evaluated"
                found.note(kind, f"{count} of category {category_id} in image {image_id}")
    found.log_notes(logger)


def _metadata(file: CocoFile, json_file: str) -> Metadata:
    """What Detectron2's evaluator has to know about a data set."""
    name = f"coco_format:{os.path.abspath(file.path)}"
    if name in MetadataCatalog.list():
        MetadataCatalog.remove(name)
    count = Counter(category.name for category in file.categories)
    return MetadataCatalog.get(name).set(
        json_file=json_file,
        evaluator_type="coco",
        # the metrics have these names
        thing_classes=[c.name if count[c.name] == 1 else f"{c.name} (id {c.id})" for c in file.categories],
        thing_dataset_id_to_contiguous_id={category.id: k for k, category in enumerate(file.categories)},
    )
