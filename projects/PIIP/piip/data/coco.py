"""COCO-format data sets as LazyConfig nodes: any annotation file and image folder, no registration by hand."""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Sequence
from typing import Any

from detectron2.data import MetadataCatalog
from detectron2.data.build import filter_images_with_only_crowd_annotations
from detectron2.data.catalog import Metadata
from detectron2.data.datasets import load_coco_json
from detectron2.evaluation import COCOEvaluator
from detectron2.utils.file_io import PathManager

from .categories import Category
from .coco_check import check_annotations, check_images_exist, drop_unusable_boxes, read_coco_json
from .errors import DatasetError

__all__ = ["build_coco_evaluator", "coco_categories", "coco_metadata", "get_coco_dicts"]

logger = logging.getLogger(__name__)


def coco_categories(annotations: str) -> tuple[Category, ...]:
    """Classes of an annotation file sorted by id: class k of a model trained on it is entry k.

    Args:
        annotations: COCO-format JSON file.

    Raises:
        DatasetError: If the file cannot be used; the message names the entry.
    """
    return _categories(annotations, *_version(annotations))


def _version(path: str) -> tuple[int, int]:
    """Changes when the file changes, so that results can be kept per file."""
    try:
        status = os.stat(PathManager.get_local_path(path)) if path else None
    except OSError:
        status = None  # read_coco_json explains it
    return (status.st_mtime_ns, status.st_size) if status else (0, 0)


@functools.lru_cache(maxsize=16)
def _categories(annotations: str, mtime: int, size: int) -> tuple[Category, ...]:
    return check_annotations(read_coco_json(annotations), annotations, require_annotations=False)


def coco_metadata(annotations: str) -> Metadata:
    """Detectron2's metadata (class names, id map, JSON file) of an annotation file, made afresh at each call.

    Args:
        annotations: COCO-format JSON file.

    Raises:
        DatasetError: If the file cannot be used.
    """
    name = _metadata_name(annotations)
    categories = coco_categories(annotations)
    if name in MetadataCatalog.list():
        MetadataCatalog.remove(name)
    return MetadataCatalog.get(name).set(
        json_file=annotations,
        evaluator_type="coco",
        thing_classes=[category.name for category in categories],
        thing_dataset_id_to_contiguous_id={category.id: k for k, category in enumerate(categories)},
    )


def _metadata_name(annotations: str) -> str:
    return f"coco_format:{os.path.abspath(annotations)}"


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
    data = read_coco_json(annotations)
    categories = check_annotations(data, annotations, require_annotations=filter_empty, require_masks=require_masks)
    check_images_exist(data, annotations, images)
    del data  # load_coco_json reads the file once more: COCO's own takes 2 GB
    if num_classes is not None and num_classes != len(categories):
        raise DatasetError(
            f"{annotations}: {len(categories)} categories, but the configuration says data.num_classes={num_classes}. "
            f"Set data.num_classes={len(categories)} (tools/lazyconfig_train_net.py of this project does so by itself)"
        )
    name = coco_metadata(annotations).name
    dicts = load_coco_json(annotations, images, name, extra_annotation_keys=["id", "area"])
    total = len(dicts)
    if drop_boxes:
        drop_unusable_boxes(dicts, annotations)
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
    for record in dicts:
        for annotation in record["annotations"]:
            annotation.pop("id", None)
            annotation.pop("area", None)
    return dicts


def build_coco_evaluator(
    annotations: str, *, output_dir: str | None = None, tasks: Sequence[str] | None = None, **kwargs: Any
) -> COCOEvaluator:
    """Detectron2's COCO evaluator for an annotation file.

    Args:
        annotations: COCO-format JSON file with the ground truth.
        output_dir: Folder for the detections in COCO's result format; None writes nothing.
        tasks: Some of "bbox", "segm", "keypoints"; by default what the predictions hold.
        kwargs: Other arguments of `COCOEvaluator`.

    Raises:
        DatasetError: If the file cannot be used.
    """
    return COCOEvaluator(coco_metadata(annotations).name, tasks=tasks, output_dir=output_dir, **kwargs)
