"""Reading COCO-format files, checked and mended before anything is trained or evaluated on them."""

from __future__ import annotations

import json
import logging
import math
import os
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from detectron2.utils.file_io import PathManager
from PIL import Image

from piip_core.images import spellings

from .coco_annotations import check_annotations, whole_number
from .dataset import Category, DatasetError, Findings, existing_folder

__all__ = ["CocoFile", "check_images_exist", "coco_categories", "load_coco"]

logger = logging.getLogger(__name__)

_LARGEST_SIDE = 10**6  # pixels


@dataclass(frozen=True)
class CocoFile:
    """A COCO-format file whose entries are checked, and mended where their meaning is clear.

    Attributes:
        path: Of the file.
        data: The parsed file, with its entries as `check_annotations` leaves them.
        categories: Sorted by id: class k of the model is entry k.
        annotations: By image id, for every image.
        unseen: The categories without an object, if the file has annotations.
        mended: Whether `data` differs from what another reader of the file gets.
    """

    path: str
    data: dict[str, Any]
    categories: tuple[Category, ...]
    annotations: dict[int, list[dict[str, Any]]]
    unseen: tuple[Category, ...]
    mended: bool


def load_coco(
    path: str, *, training: bool, require_annotations: bool = True, require_masks: bool | None = False
) -> CocoFile:
    """Reads an annotation file and checks every entry; one warning counts what is mended, left out or odd.

    Args:
        path: COCO-format JSON file.
        training: Whether to leave out what the published training does not use, or what no detection can match: see
            `check_annotations`.
        require_annotations: Whether a file without 'annotations' (a test set) is an error.
        require_masks: Whether every object must have a mask; otherwise, masks that are none are left out. None: if any
            object has one.

    Raises:
        DatasetError: If the file cannot be read or has an entry that cannot be meant; see the functions below.
    """
    data, mended = _read(path)
    _check_lists(data, path, ("images", "categories", *(("annotations",) if require_annotations else ())))
    found = Findings(path)
    categories = _check_categories(data["categories"], found)
    mended |= _check_images(data["images"], found)
    annotations = data.get("annotations", [])
    _check_objects("annotation", annotations, path)
    found.raise_errors()
    if require_masks is None:
        require_masks = any(annotation.get("segmentation") for annotation in annotations)
    by_image, changed = check_annotations(
        annotations,
        {image["id"]: image for image in data["images"]},
        {category.id for category in categories},
        found,
        training=training,
        require_masks=require_masks,
    )
    unseen: tuple[Category, ...] = ()
    if "annotations" in data:
        data["annotations"] = [annotation for group in by_image.values() for annotation in group]
        seen = {annotation["category_id"] for annotation in data["annotations"] if not annotation["iscrowd"]}
        unseen = tuple(category for category in categories if category.id not in seen)
    effect = "are never learned" if training else "are in no mean (their AP is NaN)"
    for category in unseen:
        kind = f"of {len(categories)} categories have no object and {effect}"
        found.note(kind, f"category {category.id} ({category.name})")
    found.log_notes(logger)
    return CocoFile(path, data, categories, by_image, unseen, mended or changed)


def coco_categories(path: str) -> tuple[Category, ...]:
    """Classes of an annotation file sorted by id: class k of a model trained on it is entry k.

    Raises:
        DatasetError: If the file cannot be read, or a category lacks a name or an id of its own.
    """
    data, _ = _read(path)
    _check_lists(data, path, ("images", "categories"))
    return _check_categories(data["categories"], Findings(path))


def check_images_exist(data: dict[str, Any], path: str, images: str) -> None:
    """Checks that every image of `load_coco`'s data from `path` lies under the folder `images`; opens none.

    Raises:
        DatasetError: If the folder or an image is missing, or a file name points out of the folder.
    """
    root = os.path.abspath(existing_folder(images, f"the folder with the images of {path}"))
    names: dict[str, list[dict[str, Any]]] = defaultdict(list)
    found = Findings(path)
    for image in data["images"]:
        # With the back-slashes of Windows where this system has none
        name = image["file_name"] if os.sep == "\\" else image["file_name"].replace("\\", "/")
        full = os.path.normpath(os.path.join(root, name))
        if os.path.commonpath([root, full]) != root:
            found.error(f"image whose file_name points out of {images}", f"image {image['id']} ({image['file_name']})")
        names[os.path.dirname(full)].append(image)
    found.raise_errors()
    for folder, entries in names.items():
        present = set(os.listdir(folder)) if os.path.isdir(folder) else set()
        for entry in entries:
            _find_spelling(entry, folder, root, present)
            if os.path.basename(entry["file_name"]) not in present:
                found.error(f"image that is not in {images}", f"image {entry['id']} ({entry['file_name']})")
            if entry.get("width", 0) * entry.get("height", 0) > 2 * (Image.MAX_IMAGE_PIXELS or math.inf):
                size = f"{entry['width']} x {entry['height']}"
                kind = f"image with more pixels than Pillow's limit of {2 * Image.MAX_IMAGE_PIXELS} (cut it up)"
                found.error(kind, f"image {entry['id']} ({entry['file_name']}, {size})")
    found.raise_errors()


def _find_spelling(entry: dict[str, Any], folder: str, root: str, present: set[str]) -> None:
    """Writes the name of the file that is there into an entry whose name merely looks like it."""
    if os.path.basename(entry["file_name"]) in present:
        return
    for spelling in spellings(entry["file_name"]):
        if os.path.basename(spelling) in present:
            entry["file_name"] = os.path.relpath(os.path.join(folder, os.path.basename(spelling)), root)
            return


def _read(path: str) -> tuple[dict[str, Any], bool]:
    """The parsed file, and whether it is in another encoding than pycocotools reads."""
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
    with open(local, "rb") as file:
        start = file.read(3)
    try:
        with open(local, encoding="utf-16" if start[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig") as file:
            data = json.load(file)
    except ValueError as error:  # JSONDecodeError and UnicodeDecodeError
        raise DatasetError(f"{path}: not valid JSON ({error}): is it cut off? Copy or export it again") from error
    except RecursionError as error:
        raise DatasetError(f"{path}: lists within lists without end: expected COCO-format JSON") from error
    if not isinstance(data, dict):
        raise DatasetError(
            f"{path}: holds a JSON {type(data).__name__}: expected an object with 'images', 'annotations' and "
            "'categories' (a list of results is not a data set)"
        )
    return data, not start.isascii()


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


def _check_keys(entry: str, items: Sequence[dict[str, Any]], whole: Sequence[str], text: str, found: Findings) -> bool:
    """Checks whole numbers and a text of every entry, and that no id is repeated; tells whether it made integers."""
    changed = False
    for index, item in enumerate(items):
        name = f"{entry} {item.get('id', f'number {index}')!s:.40}"
        for key in whole:
            value = item.get(key)
            number = whole_number(value)
            if number is None:
                found.error(f"{entry} without a valid '{key}' (expected int)", f"{name} ({key}: {value!r:.40})")
            elif number is not value:
                item[key], changed = number, True
        if not isinstance(item.get(text), str):
            found.error(f"{entry} without a valid '{text}' (expected str)", f"{name} ({text}: {item.get(text)!r:.40})")
    found.raise_errors()
    for repeated, count in Counter(item["id"] for item in items).items():
        if count > 1:
            found.error(f"{entry} id used more than once", f"{entry} {repeated}")
    return changed


def _check_categories(items: list[Any], found: Findings) -> tuple[Category, ...]:
    _check_objects("category", items, found.path)
    _check_keys("category", items, ("id",), "name", found)
    found.raise_errors()
    count = Counter(item["name"] for item in items)
    for item in items:
        if count[item["name"]] > 1:
            found.note("categories share a name but are different ones", f"category {item['id']} ({item['name']})")
    return tuple(sorted((Category(item["id"], item["name"]) for item in items), key=lambda c: c.id))


def _check_images(items: list[Any], found: Findings) -> bool:
    _check_objects("image", items, found.path)
    changed = _check_keys("image", items, ("id", "height", "width"), "file_name", found)
    first: dict[str, int] = {}
    for image in items:
        sides = image["height"], image["width"]
        if not 1 <= min(sides) <= max(sides) <= _LARGEST_SIDE:
            found.error(
                f"image with a side below 1 pixel or above {_LARGEST_SIDE}",
                f"image {image['id']} (height {sides[0]}, width {sides[1]})",
            )
        before = first.setdefault(os.path.normpath(image["file_name"]), image["id"])
        if before != image["id"]:
            found.error(
                "image file under a second id (each would lack the other's objects; put all under one id)",
                f"image {image['id']} ({image['file_name']}, also image {before})",
            )
    return changed
