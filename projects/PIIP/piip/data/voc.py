"""Pascal VOC data sets: an XML file for each image."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from piip_core.images import image_endings

from .dataset import READERS, DatasetError, first_few, read_all, read_image_size

_ANNOTATIONS, _IMAGES = ("Annotations", "annotations", ""), ("JPEGImages", "images", "")
_SIDES = ("xmin", "ymin", "xmax", "ymax")
_PARTS = {"train": ("train",), "val": ("val", "valid", "validation", "test")}


def find_voc(root: Path) -> bool:
    """Whether a folder looks like it: XML files in Annotations, beside the images, or so below train."""
    return bool(_files(root) or _files(root / "train"))


def read_voc(root: Path) -> dict[str, tuple[dict[str, Any], Path]]:
    """Parts ("train", and "val" if there is one) in COCO's format, each with the folder of its images.

    Parts are those of ImageSets/Main, or folders train and valid. Pixels count from 1 in the files, here from 0.

    Raises:
        DatasetError: With the file that cannot be used.
    """
    files = {part: found for part, words in _PARTS.items() for word in words if (found := _files(root / word))}
    if "train" not in files:
        everything = {path.stem: path for path in _files(root)}
        lists = {part: root / "ImageSets" / "Main" / f"{part}.txt" for part in _PARTS}
        files = {part: _chosen(path, everything) for part, path in lists.items() if path.is_file()}
        if len(files) < len(lists):
            files = {"train": list(everything.values())}
    if not files["train"]:
        raise DatasetError(f"{root}: no XML file in Annotations or beside the images")
    parsed = {part: [_parse(path) for path in paths] for part, paths in files.items()}
    objects = [found for part in parsed.values() for tree in part for found in tree.iter("object")]
    names = sorted({found.findtext("name", "").strip() for found in objects} - {""})
    if not names:
        raise DatasetError(f"{root}: none of its {len(parsed['train'])} XML files has an object with a name")
    return {part: _to_coco(files[part], parsed[part], names) for part in files}


def _files(folder: Path) -> list[Path]:
    """XML files of one folder."""
    return next((found for name in _ANNOTATIONS if (found := sorted((folder / name).glob("*.xml")))), [])


def _chosen(path: Path, files: dict[str, Path]) -> list[Path]:
    found = []
    for number, line in enumerate(path.read_text(encoding="utf-8-sig").splitlines(), 1):
        if line.strip():
            name = line.split()[0]
            if name not in files:
                raise DatasetError(f"{path}:{number}: {name}: has no XML file")
            found.append(files[name])
    return found


def _parse(path: Path) -> ElementTree.Element:
    try:
        return ElementTree.parse(path).getroot()
    except ElementTree.ParseError as error:
        raise DatasetError(f"{path}:{error.position[0]}: not valid XML ({error})") from error


def _to_coco(
    files: Sequence[Path], parsed: Sequence[ElementTree.Element], names: Sequence[str]
) -> tuple[dict[str, Any], Path]:
    images = [_image(path) for path in files]
    root = Path(os.path.commonpath([os.path.abspath(image.parent) for image in images]))
    sizes = read_all(lambda image: read_image_size(str(image)), images, "Reading images", READERS)
    records, annotations = [], []
    for number, (path, tree, image, size) in enumerate(zip(files, parsed, images, sizes, strict=True), 1):
        height, width = (_number(path, tree, f"size/{side}") for side in ("height", "width"))
        if (height, width) != size:
            raise DatasetError(f"{path}: size {width:g} x {height:g}, but {image} has {size[1]} x {size[0]}")
        name = os.path.relpath(os.path.abspath(image), root)
        records.append({"id": number, "file_name": name, "height": size[0], "width": size[1]})
        for found in tree.iter("object"):
            label = found.findtext("name", "").strip()
            if not label:
                raise DatasetError(f"{path}: an object without a name")
            left, top, right, bottom = (_number(path, found, f"bndbox/{side}") for side in _SIDES)
            box = [left - 1, top - 1, right - left + 1, bottom - top + 1]
            annotation = {"id": len(annotations) + 1, "image_id": number, "category_id": names.index(label) + 1}
            annotations.append({**annotation, "iscrowd": 0, "bbox": box, "label_file": str(path)})
    categories = [{"id": index, "name": name} for index, name in enumerate(names, 1)]
    return {"images": records, "categories": categories, "annotations": annotations}, root


def _number(path: Path, node: ElementTree.Element, key: str) -> float:
    text = node.findtext(key)
    try:
        return float(text or "")
    except ValueError:
        raise DatasetError(f"{path}: {key}: {text!r}: expected a number in <{node.tag}>") from None


def _image(path: Path) -> Path:
    """The image of an XML file: of the same name, beside it or in the folder beside its own."""
    folders = [path.parent, *(path.parent.parent / name for name in _IMAGES if name)]
    found = [each for folder in folders for ending in image_endings() for each in _spelled(folder / path.stem, ending)]
    if not found:
        raise DatasetError(
            f"{path}: label without image: expected {first_few([f'{f.name}/{path.stem}.*' for f in folders])}"
        )
    return found[0]


def _spelled(stem: Path, ending: str) -> list[Path]:
    paths = (stem.with_name(stem.name + each) for each in (ending, ending.upper()))
    return [path for path in paths if path.is_file()]
