"""YOLO data sets, as Ultralytics and Roboflow write them: `data.yaml`, images, and a text file of labels for each."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from piip_core.images import image_endings

from .dataset import READERS, DatasetError, find_files, first_few, read_all, read_image_size

_ROUNDING = 1e-3  # of coordinates that a tool wrote with few digits
_NO_LABELS = "classes names labels train val valid test README".split()  # other text files that tools write


def find_yolo(root: Path) -> bool:
    """Whether a folder looks like it: a YAML file with class names, or text files in a folder of labels."""
    files = (
        path for pattern in ("labels", "*/labels") for folder in root.glob(pattern) for path in folder.rglob("*.txt")
    )
    return bool(_descriptions(root)) or any(path.stem not in _NO_LABELS for path in files)


def read_yolo(root: Path) -> dict[str, tuple[dict[str, Any], Path]]:
    """Parts ("train", and "val" if there is one) in COCO's format, each with the folder of its images.

    Category k is the class of index k. Images without a label file have no objects. Labels are boxes (class, centre,
    width and height) or polygons (class and at least three points), in parts of the image's sides.

    Raises:
        DatasetError: With file and line of a label that cannot be used.
    """
    file, settings = _description(root)
    names = _class_names(file, settings)
    parts = {}
    for part in ("train", "val"):
        entries = settings.get(part)
        if entries:
            images = [image for entry in _listed(entries, f"{file}: {part}") for image in _find(entry, file, settings)]
            if not images:
                raise DatasetError(f"{file}: {part}: {entries}: no image there")
            parts[part] = _to_coco(images, names)
    return parts


def _descriptions(root: Path) -> dict[Path, dict[str, Any]]:
    """YAML files that describe a data set."""
    found = {}
    for path in sorted([*root.glob("*.yaml"), *root.glob("*.yml")]):
        try:
            content = yaml.safe_load(path.read_text(encoding="utf-8-sig"))
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise DatasetError(f"{path}: cannot be read as YAML ({' '.join(str(error).split())})") from error
        if isinstance(content, dict) and ({"names", "train", "nc"} & content.keys()):
            found[path] = content
    return found


def _description(root: Path) -> tuple[Path, dict[str, Any]]:
    found = _descriptions(root)
    if len(found) > 1:
        raise DatasetError(f"{root}: describes itself in {first_few([str(p) for p in found])}: expected one data.yaml")
    if found:
        ((path, settings),) = found.items()
        for key in ("names", "train"):
            if not settings.get(key):
                raise DatasetError(f"{path}: has no '{key}': expected train, names and, if there is one, val")
        if "kpt_shape" in settings:
            raise DatasetError(f"{path}: kpt_shape: labels of poses: expected boxes or polygons")
        return path, settings
    names = root / "classes.txt"  # as Label Studio exports
    if names.is_file() and (root / "images").is_dir():
        return names, {"train": "images", "names": names.read_text(encoding="utf-8-sig").split("\n")}
    raise DatasetError(f"{root}: has label files, but no data.yaml with train, val and names")


def _class_names(file: Path, settings: dict[str, Any]) -> list[str]:
    names = settings["names"]
    if isinstance(names, dict):
        if sorted(names, key=str) != sorted(range(len(names)), key=str):
            raise DatasetError(f"{file}: names: indices {list(names)[:5]}: expected 0 to {len(names) - 1}")
        names = [names[index] for index in range(len(names))]
    if not isinstance(names, list):
        raise DatasetError(f"{file}: names: {names!r:.60}: expected a list, or index: name")
    names = [str(name).strip() for name in names if str(name).strip()]
    if settings.get("nc", len(names)) != len(names):
        raise DatasetError(f"{file}: nc: {settings['nc']}, but there are {len(names)} names")
    return names


def _listed(entries: Any, what: str) -> list[str]:
    entries = entries if isinstance(entries, list) else [entries]
    if not all(isinstance(entry, str) for entry in entries):
        raise DatasetError(f"{what}: {entries!r:.60}: expected a folder, a text file, or a list of them")
    return entries


def _find(entry: str, file: Path, settings: dict[str, Any]) -> list[Path]:
    """Images of a folder, or of a text file with a path a line; below `path`, beside data.yaml, or as Roboflow says."""
    base = file.parent / str(settings.get("path") or "")
    inner = entry.lstrip("./")
    tried = [base / entry, file.parent / entry, base / inner, file.parent / inner]
    found = next((path for path in tried if path.exists()), None)
    if found is None:
        raise DatasetError(f"{file}: {entry}: no such folder or file (looked for {tried[0]} and {tried[-1]})")
    if found.is_dir():
        images = [Path(path) for path in find_files(str(found), image_endings())[0]]
        _check_labels(found, images)
        return images
    lines = [line.strip() for line in _lines(found)]
    images = [found.parent / line for line in lines if line]
    for number, line in enumerate(lines, 1):
        if line and not (found.parent / line).is_file():
            raise DatasetError(f"{found}:{number}: {line}: no such image")
    return images


def _check_labels(folder: Path, images: Sequence[Path]) -> None:
    """Every label file of a folder belongs to an image, and at least one image has one."""
    known = {_label_file(image) for image in images}
    folders = {path.parent for path in known}
    files = {path for inner in folders for path in inner.glob("[!.]*.txt") if path.stem not in _NO_LABELS}
    if lost := sorted(files - known):
        raise DatasetError(f"{lost[0]}: label without image in {folder}" + f" ({len(lost)} of them)" * (len(lost) > 1))
    if images and not files & known:
        raise DatasetError(f"{folder}: none of {len(images)} images has labels: expected {_label_file(images[0])}")


def _label_file(image: Path) -> Path:
    """Ultralytics' rule: the last folder called images is labels."""
    parts = list(image.parts)
    for index in reversed(range(len(parts) - 1)):
        if parts[index] == "images":
            parts[index] = "labels"
            break
    return Path(*parts).with_suffix(".txt")


def _to_coco(images: Sequence[Path], names: Sequence[str]) -> tuple[dict[str, Any], Path]:
    root = Path(os.path.commonpath([os.path.abspath(image.parent) for image in images]))
    records, annotations = [], []
    by_label: dict[Path, Path] = {}
    for image in images:
        if (other := by_label.setdefault(_label_file(image), image)) != image:
            raise DatasetError(f"{image}: shares its label file with {other}: expected images of different names")

    def read(image: Path) -> tuple[tuple[int, int], list[dict[str, Any]]]:
        size, file = read_image_size(str(image)), _label_file(image)
        return size, _read_labels(file, size, len(names)) if file.is_file() else []

    labels = read_all(read, images, "Reading labels", READERS)
    for number, (image, (size, found)) in enumerate(zip(images, labels, strict=True), 1):
        name = os.path.relpath(os.path.abspath(image), root)
        records.append({"id": number, "file_name": name, "height": size[0], "width": size[1]})
        for label in found:
            annotations.append({"id": len(annotations) + 1, "image_id": number, "iscrowd": 0, **label})
    categories = [{"id": index, "name": name} for index, name in enumerate(names)]
    return {"images": records, "categories": categories, "annotations": annotations}, root


def _read_labels(file: Path, size: tuple[int, int], num_classes: int) -> list[dict[str, Any]]:
    """Annotations of an image (height, width)."""
    found = []
    for number, line in enumerate(_lines(file), 1):
        if not line.strip():
            continue
        where = f"{file}:{number}"
        try:
            index, *values = map(float, line.split())
        except ValueError:
            raise DatasetError(f"{where}: {line.strip():.60}: expected numbers") from None
        if len(values) != 4 and (len(values) < 6 or len(values) % 2):
            raise DatasetError(
                f"{where}: {len(values) + 1} values: expected class, centre x and y, width and height; or class and "
                "x, y of at least three points"
            )
        if not (index.is_integer() and 0 <= index < num_classes):
            raise DatasetError(f"{where}: class {index:g}: expected 0 to {num_classes - 1}, the names in data.yaml")
        outside = [value for value in values if not -_ROUNDING <= value <= 1 + _ROUNDING]
        if outside:
            raise DatasetError(f"{where}: coordinate {outside[0]:g}: expected 0 to 1, parts of the image's sides")
        found.append({"category_id": int(index), "label_file": where, **_label(values, *size)})
    return found


def _label(values: Sequence[float], height: int, width: int) -> dict[str, Any]:
    if len(values) == 4:
        x, y, w, h = values
        return {"bbox": [(x - w / 2) * width, (y - h / 2) * height, w * width, h * height]}
    xs, ys = [x * width for x in values[::2]], [y * height for y in values[1::2]]
    polygon = [value for point in zip(xs, ys, strict=True) for value in point]
    left, top = min(xs), min(ys)
    return {"bbox": [left, top, max(xs) - left, max(ys) - top], "segmentation": [polygon]}


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise DatasetError(f"{path}: not a text file in UTF-8 ({error.reason})") from error
