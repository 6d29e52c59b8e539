"""Checks of a COCO-format data set before anything is trained on it; every complaint names file and entry."""

from __future__ import annotations

import json
import logging
import math
import os
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

from detectron2.utils.file_io import PathManager

from .categories import Category
from .errors import DatasetError, first_few

__all__ = ["check_annotations", "check_images_exist", "drop_unusable_boxes", "read_coco_json"]

logger = logging.getLogger(__name__)


def read_coco_json(path: str) -> dict[str, Any]:
    """Parses an annotation file.

    Raises:
        DatasetError: If it is missing, empty, not JSON or not a JSON object.
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
        with open(local, encoding="utf-8") as file:
            data = json.load(file)
    except ValueError as error:  # JSONDecodeError and UnicodeDecodeError
        raise DatasetError(f"{path}: not valid JSON ({error}): is it cut off? Copy or export it again") from error
    if not isinstance(data, dict):
        raise DatasetError(
            f"{path}: holds a JSON {type(data).__name__}: expected an object with 'images', 'annotations' and "
            "'categories' (a list of results is not a data set)"
        )
    return data


def check_annotations(
    data: dict[str, Any], path: str, *, require_annotations: bool = True, require_masks: bool = False
) -> tuple[Category, ...]:
    """Checks the structure of a parsed annotation file and the references inside it.

    Args:
        data: What `read_coco_json` returned.
        path: Its path, for messages.
        require_annotations: Whether a file without 'annotations' (a test set) is an error.
        require_masks: Whether every non-crowd annotation needs a 'segmentation'.

    Returns:
        The categories, sorted by id: class k of the model is entry k.

    Raises:
        DatasetError: If keys are missing or of the wrong type, ids are repeated, an annotation refers to an image or
            category that does not exist, or a box is not four finite numbers.
    """
    required = ("images", "categories", *(("annotations",) if require_annotations else ()))
    for key in required:
        if not isinstance(data.get(key), list):
            found = type(data[key]).__name__ if key in data else f"only {sorted(data)}"
            raise DatasetError(f"{path}: expected a list under '{key}', found {found}: not COCO format")
        if not data[key]:
            raise DatasetError(f"{path}: the list '{key}' is empty: expected at least one entry")

    checks = _Complaints(path)
    image_ids = checks.unique_ids("image", data["images"], {"file_name": str, "height": int, "width": int})
    checks.add("image with a side below 1 pixel", "image", _where(data["images"], _bad_image_size))
    category_ids = checks.unique_ids("category", data["categories"], {"name": str})
    annotations = data.get("annotations", [])
    checks.unique_ids("annotation", annotations, {"image_id": int, "category_id": int})
    checks.raise_any()

    checks.add(
        "annotation of an image that is not in 'images'",
        "annotation",
        _where(annotations, lambda a: a["image_id"] not in image_ids, "image_id"),
    )
    checks.add(
        "annotation of a category that is not in 'categories'",
        "annotation",
        _where(annotations, lambda a: a["category_id"] not in category_ids, "category_id"),
    )
    checks.add(
        "annotation whose 'bbox' is not four finite numbers [x, y, width, height]",
        "annotation",
        _where(annotations, _bad_box, "bbox"),
    )
    checks.add(
        "annotation with 'ignore', which COCO's format does not have",
        "annotation",
        _where(annotations, lambda a: a.get("ignore", 0) != 0),
    )
    if require_masks:
        checks.add(
            "annotation without 'segmentation', needed to train masks (for boxes only, use a model without mask head "
            "and dataloader.train.mapper.use_instance_mask=False)",
            "annotation",
            _where(annotations, lambda a: not a.get("iscrowd", 0) and not a.get("segmentation")),
        )
    checks.raise_any()
    if annotations and 0 in (annotation["id"] for annotation in annotations):
        logger.warning(
            "%s: annotation id 0: pycocotools takes 0 for 'not matched', so AP comes out too low; "
            "number annotations from 1",
            path,
        )
    return tuple(sorted((Category(c["id"], c["name"]) for c in data["categories"]), key=lambda c: c.id))


def check_images_exist(data: dict[str, Any], path: str, images: str) -> None:
    """Checks that every image of an annotation file lies under a folder; lists each folder once, opens nothing.

    Args:
        data: What `read_coco_json` returned, checked.
        path: Its path, for messages.
        images: Folder that the file names are relative to.

    Raises:
        DatasetError: If the folder or an image is missing, or a file name points out of the folder.
    """
    local = PathManager.get_local_path(images) if images else ""
    if not os.path.isdir(local):
        kind = "is a file" if os.path.isfile(local) else "no such folder"
        raise DatasetError(
            f"{images}: {kind} (looked from {os.getcwd()}): expected the folder with the images of {path}. "
            "Set data.train.images and data.test.images, or DETECTRON2_DATASETS for the standard layout"
        )
    root = os.path.abspath(local)
    names: dict[str, list[dict[str, Any]]] = defaultdict(list)
    checks = _Complaints(path)
    outside = []
    for image in data["images"]:
        full = os.path.normpath(os.path.join(root, image["file_name"]))
        if os.path.commonpath([root, full]) != root:
            outside.append(f"{image['id']} ({image['file_name']})")
        names[os.path.dirname(full)].append(image)
    checks.add(f"image whose file_name points out of {images}", "image", outside)
    checks.raise_any()
    missing = []
    for folder, entries in names.items():
        present = set(os.listdir(folder)) if os.path.isdir(folder) else set()
        missing += [f"{e['id']} ({e['file_name']})" for e in entries if os.path.basename(e["file_name"]) not in present]
    checks.add(f"image that is not in {images}", "image", missing)
    checks.raise_any()


def drop_unusable_boxes(dicts: Sequence[dict[str, Any]], path: str) -> None:
    """Removes, in place, boxes that the published training does not use; warns once about them and about clipped ones.

    Dropped: no overlap with the image, a side below 1 pixel, an area of 0 or less. Boxes that reach out of the image
    stay; Detectron2 clips them when it maps the image.

    Args:
        dicts: Records of `load_coco_json` with the annotations' "id" and "area".
        path: Annotation file, for the warning.
    """
    clipped, dropped = [], []
    for record in dicts:
        height, width = record["height"], record["width"]
        kept = []
        for annotation in record["annotations"]:
            x, y, w, h = annotation["bbox"]
            overlap_w, overlap_h = min(x + w, width) - max(x, 0), min(y + h, height) - max(y, 0)
            # The comparison form also drops what is not a number.
            if not (overlap_w > 0 and overlap_h > 0 and w >= 1 and h >= 1 and annotation.get("area", w * h) > 0):
                dropped.append(f"{annotation['id']} (bbox {annotation['bbox']}, {record['file_name']})")
                continue
            kept.append(annotation)
            # Rounded annotations overshoot by parts of a pixel everywhere: not worth a word.
            if x < -1 or y < -1 or x + w > width + 1 or y + h > height + 1:
                clipped.append(f"{annotation['id']} (bbox {annotation['bbox']}, {record['file_name']})")
        record["annotations"] = kept
    if clipped or dropped:
        parts = []
        if dropped:
            parts.append(
                f"{len(dropped)} boxes without usable area in the image are dropped: annotation {first_few(dropped)}"
            )
        if clipped:
            parts.append(
                f"{len(clipped)} boxes reach out of the image and are clipped: annotation {first_few(clipped)}"
            )
        logger.warning("%s: %s", path, "; ".join(parts))


class _Complaints:
    """Collects problems of one file and raises them together."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.problems: list[str] = []

    def add(self, problem: str, entry: str, found: Iterable[str]) -> None:
        found = list(found)
        if found:
            self.problems.append(f"{len(found)} x {problem}: {entry} {first_few(found)}")

    def unique_ids(self, entry: str, items: list[Any], keys: dict[str, type]) -> set[int]:
        """Ids of the entries, after noting what is missing, mistyped or repeated."""
        if any(not isinstance(item, dict) for item in items):
            index = next(i for i, item in enumerate(items) if not isinstance(item, dict))
            raise DatasetError(f"{self.path}: {entry} number {index} is {items[index]!r}: expected a JSON object")
        for key, kind in {"id": int, **keys}.items():
            bad = [
                f"{item.get('id', f'number {index}')} ({key}: {item.get(key, 'missing')!r})"
                for index, item in enumerate(items)
                if not isinstance(item.get(key), kind) or isinstance(item.get(key), bool)
            ]
            self.add(f"{entry} without a valid '{key}' (expected {kind.__name__})", entry, bad)
        seen: set[int] = set()
        repeated = []
        for item in items:
            if isinstance(item.get("id"), int):
                if item["id"] in seen:
                    repeated.append(str(item["id"]))
                seen.add(item["id"])
        self.add(f"{entry} id used more than once", entry, repeated)
        return seen

    def raise_any(self) -> None:
        if self.problems:
            raise DatasetError(f"{self.path}: " + "; ".join(self.problems))


def _where(items: list[dict[str, Any]], is_bad: Any, key: str | None = None) -> list[str]:
    return [f"{item['id']}" + (f" ({key} {item.get(key)!r})" if key else "") for item in items if is_bad(item)]


def _bad_image_size(image: dict[str, Any]) -> bool:
    sides = (image.get("height"), image.get("width"))
    return all(isinstance(side, int) for side in sides) and min(sides) < 1


def _bad_box(annotation: dict[str, Any]) -> bool:
    box = annotation.get("bbox")
    return not (
        isinstance(box, list)
        and len(box) == 4
        and all(isinstance(value, (int, float)) and math.isfinite(value) for value in box)
    )
