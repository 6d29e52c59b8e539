"""COCO-format data sets as LazyConfig nodes: any annotation file and image folder, no registration by hand.

Every file is checked, and mended where its meaning is clear, before anything is trained or evaluated on it.
"""

from __future__ import annotations

import json
import logging
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from detectron2.data import MetadataCatalog
from detectron2.data.build import filter_images_with_only_crowd_annotations
from detectron2.evaluation import COCOEvaluator
from detectron2.structures import BoxMode
from detectron2.utils.file_io import PathManager

from piip_core.files import write_atomically
from piip_core.images import spellings

from .coco_annotations import Findings, check_annotations, compressed, whole_number
from .dataset import Category, DatasetError, check_num_classes, existing_folder

logger = logging.getLogger(__name__)

GROUND_TRUTH = "ground_truth.json"
"""What the objects are called, as they are evaluated, beside the detections."""

_LARGEST_SIDE = 10**6  # pixels


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
    file = _load(annotations, training=drop_boxes, require_annotations=filter_empty, require_masks=require_masks)
    _find_images(file.data, annotations, images)
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


def coco_categories(path: str) -> tuple[Category, ...]:
    """Classes of an annotation file sorted by id: class k of a model trained on it is entry k.

    Raises:
        DatasetError: If the file cannot be read, or a category lacks a name or an id of its own.
    """
    data = read_coco(path)
    _check_lists(data, path, ("images", "categories"))
    return _check_categories(data["categories"], Findings(path))


def build_coco_evaluator(
    annotations: str, *, output_dir: str | None = None, require_masks: bool = False, **kwargs: Any
) -> COCOEvaluator:
    """Detectron2's COCO evaluator for an annotation file, checked and mended as for training.

    Args:
        annotations: COCO-format JSON file with the ground truth.
        output_dir: Folder for the detections in COCO's result format and the objects; None writes nothing.
        require_masks: Every object must have a mask, and predicted masks are evaluated; otherwise boxes alone.
        kwargs: Other arguments of `COCOEvaluator`.

    Raises:
        DatasetError: If the file cannot be used.
    """
    file = _load(annotations, training=False, require_annotations=False, require_masks=require_masks)
    count = Counter(category.name for category in file.categories)
    name = f"coco_format:{os.path.abspath(annotations)}"
    if name in MetadataCatalog.list():
        MetadataCatalog.remove(name)
    with TemporaryDirectory(prefix="piip_") as folder:  # the evaluator reads nothing but a file, when it is made
        path = Path(output_dir or folder, GROUND_TRUTH)
        path.parent.mkdir(parents=True, exist_ok=True)
        with write_atomically(path, "w") as written:
            json.dump(file.data, written)
        MetadataCatalog.get(name).set(
            json_file=str(path),
            evaluator_type="coco",
            # the metrics have these names
            thing_classes=[c.name if count[c.name] == 1 else f"{c.name} (id {c.id})" for c in file.categories],
            thing_dataset_id_to_contiguous_id={category.id: k for k, category in enumerate(file.categories)},
        )
        tasks = None if require_masks else ("bbox",)
        return COCOEvaluator(name, **{"tasks": tasks, "output_dir": output_dir, **kwargs})


@dataclass(frozen=True)
class _CocoFile:
    """A file whose entries are checked, and mended where their meaning is clear."""

    data: dict[str, Any]
    categories: tuple[Category, ...]  # sorted by id: class k of the model is entry k
    annotations: dict[int, list[dict[str, Any]]]  # by image id, for every image


def _load(path: str, *, training: bool, require_annotations: bool, require_masks: bool) -> _CocoFile:
    """Reads an annotation file and checks every entry; one warning counts what is mended, left out or odd.

    See `check_annotations`. Without `require_annotations`, the list may be missing: a test set.
    """
    data = read_coco(path)
    _check_lists(data, path, ("images", "categories", *(("annotations",) if require_annotations else ())))
    found = Findings(path)
    categories = _check_categories(data["categories"], found)
    _check_images(data["images"], found)
    annotations = data.get("annotations", [])
    _check_objects("annotation", annotations, path)
    by_image = check_annotations(
        annotations,
        {image["id"]: image for image in data["images"]},
        {category.id for category in categories},
        found,
        training=training,
        require_masks=require_masks,
    )
    if "annotations" in data:
        data["annotations"] = [annotation for group in by_image.values() for annotation in group]
        seen = {annotation["category_id"] for annotation in data["annotations"] if not annotation["iscrowd"]}
        effect = "are never learned" if training else "are in no mean (their AP is NaN)"
        for category in (category for category in categories if category.id not in seen):
            kind = f"of {len(categories)} categories have no object and {effect}"
            found.note(kind, f"category {category.id} ({category.name})")
    found.log_notes(logger)
    return _CocoFile(data, categories, by_image)


def _standard_dicts(file: _CocoFile, images: str) -> list[dict[str, Any]]:
    """A checked file in Detectron2's standard form, in the order of the image ids."""
    classes = {category.id: k for k, category in enumerate(file.categories)}
    dicts = []
    for image in sorted(file.data["images"], key=lambda image: image["id"]):
        record = {"file_name": os.path.join(images, image["file_name"]), "image_id": image["id"]}
        record |= {"height": image["height"], "width": image["width"], "annotations": []}
        for annotation in file.annotations[image["id"]]:
            found = {key: annotation[key] for key in ("iscrowd", "bbox")}
            found |= {"bbox_mode": BoxMode.XYWH_ABS, "category_id": classes[annotation["category_id"]]}
            if mask := annotation.get("segmentation"):
                found["segmentation"] = compressed(mask) if isinstance(mask, dict) else mask
            record["annotations"].append(found)
        dicts.append(record)
    return dicts


def _find_images(data: dict[str, Any], path: str, images: str) -> None:
    """Checks that every image lies below the folder `images`; a name that merely looks like the file's is mended."""
    root = os.path.abspath(existing_folder(images, f"the folder with the images of {path}"))
    names_in = cache(lambda folder: frozenset(os.listdir(folder)) if os.path.isdir(folder) else frozenset())
    found = Findings(path)
    for image in data["images"]:
        name = f"image {image['id']} ({image['file_name']})"
        for spelling in (image["file_name"], *spellings(image["file_name"])):
            full = os.path.normpath(os.path.join(root, spelling))
            if os.path.commonpath([root, full]) != root:
                found.error(f"image whose file_name points out of {images}", name)
                break
            if os.path.basename(full) in names_in(os.path.dirname(full)):
                image["file_name"] = spelling
                break
        else:
            found.error(f"image that is not in {images}", name)
    found.raise_errors()


def read_coco(path: str) -> dict[str, Any]:
    """The content of an annotation file, unchecked but for being a JSON object.

    Raises:
        DatasetError: If it cannot be read.
    """
    if not path:
        raise DatasetError("no annotation file given: expected the path of a COCO-format JSON file")
    local = PathManager.get_local_path(path)
    if os.path.isdir(local):
        raise DatasetError(f"{path}: is a folder: expected a COCO-format annotation file (.json)")
    if not os.path.isfile(local):
        raise DatasetError(
            f"{path}: no such file (looked from {os.getcwd()}): expected a COCO-format annotation file. Set "
            "data.train.annotations and data.test.annotations, or DETECTRON2_DATASETS for the standard layout"
        )
    if os.path.getsize(local) == 0:
        raise DatasetError(f"{path}: the file is empty (0 bytes): expected COCO-format JSON")
    try:
        data = json.loads(Path(local).read_bytes())  # with or without a byte order mark
    except ValueError as error:  # JSONDecodeError and UnicodeDecodeError
        raise DatasetError(f"{path}: not valid JSON ({error}): is it cut off? Copy or export it again") from error
    except RecursionError as error:
        raise DatasetError(f"{path}: lists within lists without end: expected COCO-format JSON") from error
    if not isinstance(data, dict):
        raise DatasetError(
            f"{path}: holds a JSON {type(data).__name__}: expected an object with 'images', 'annotations' and "
            "'categories' (a list of results is not a data set)"
        )
    return data


def _check_lists(data: dict[str, Any], path: str, required: Sequence[str]) -> None:
    for key in ("images", "categories", "annotations"):
        if not isinstance(data.get(key, None if key in required else []), list):
            found = type(data[key]).__name__ if key in data else f"only {sorted(data)}"
            raise DatasetError(f"{path}: expected a list under '{key}', found {found}: not COCO format")
        if key in required and not data[key]:
            raise DatasetError(f"{path}: the list '{key}' is empty: expected at least one entry")


def _check_objects(entry: str, items: Sequence[Any], path: str) -> None:
    for index, item in enumerate(items):
        if not isinstance(item, dict):
            raise DatasetError(f"{path}: {entry} number {index} is {item!r:.80}: expected a JSON object")


def _check_keys(entry: str, items: Sequence[dict[str, Any]], whole: Sequence[str], text: str, found: Findings) -> None:
    """Checks whole numbers and a text of every entry, and that no id is repeated."""
    _check_objects(entry, items, found.path)
    for index, item in enumerate(items):
        name = f"{entry} {item.get('id', f'number {index}')!s:.40}"
        for key in whole:
            value = item.get(key)
            item[key] = whole_number(value)
            if item[key] is None:
                found.error(f"{entry} without a valid '{key}' (expected int)", f"{name} ({key}: {value!r:.40})")
        if not isinstance(item.get(text), str):
            found.error(f"{entry} without a valid '{text}' (expected str)", f"{name} ({text}: {item.get(text)!r:.40})")
    found.raise_errors()
    for repeated, count in Counter(item["id"] for item in items).items():
        if count > 1:
            found.error(f"{entry} id used more than once", f"{entry} {repeated}")
    found.raise_errors()


def _check_categories(items: list[Any], found: Findings) -> tuple[Category, ...]:
    _check_keys("category", items, ("id",), "name", found)
    count = Counter(item["name"] for item in items)
    for item in items:
        if count[item["name"]] > 1:
            found.note("categories share a name but are different ones", f"category {item['id']} ({item['name']})")
    return tuple(sorted((Category(item["id"], item["name"]) for item in items), key=lambda c: c.id))


def _check_images(items: list[Any], found: Findings) -> None:
    _check_keys("image", items, ("id", "height", "width"), "file_name", found)
    first: dict[str, int] = {}
    for image in items:
        height, width = image["height"], image["width"]
        if not 1 <= min(height, width) <= max(height, width) <= _LARGEST_SIDE:
            kind = f"image with a side below 1 pixel or above {_LARGEST_SIDE}"
            found.error(kind, f"image {image['id']} (height {height}, width {width})")
        before = first.setdefault(os.path.normpath(image["file_name"]), image["id"])
        if before != image["id"]:
            kind = "image file under a second id (each would lack the other's objects; put all under one id)"
            found.error(kind, f"image {image['id']} ({image['file_name']}, also image {before})")
