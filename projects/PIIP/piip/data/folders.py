"""Folders of images as people have them: what form they are in, and the settings of a LazyConfig that read them."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from piip_core.errors import check
from piip_core.files import write_atomically
from piip_core.images import image_endings

from .classification import folder_categories, get_test_dicts, get_train_dicts
from .coco import coco_categories, get_coco_dicts, read_coco
from .dataset import DatasetError, first_few
from .label_maps import IGNORE_LABEL, label_classes, read_label_map
from .segmentation import Pair, find_pairs
from .voc import find_voc, read_voc
from .yolo import find_yolo, read_yolo

_TRAIN, _VALIDATION = ("train", "training", "train2017"), ("val", "valid", "validation", "val2017", "test")
_LABELS = ("labels", "masks", "annotations", "segmentations")
_NAMES = ("names.txt", "classes.txt", "labels.txt", "labels/names.txt")
_ROBOFLOW = "_annotations.coco.json"


@dataclass(frozen=True)
class OwnData:
    """A folder that was recognised.

    Attributes:
        form: What it is, in words.
        task: "segment", "detect", "semantic" or "classify": the most that it can teach.
        counts: Training and validation images.
        classes: Names of the classes.
        settings: What a LazyConfig says to read it, "data.train.images" and so on.
        split: How the validation images were chosen, if nobody had.
    """

    form: str
    task: str
    counts: tuple[int, int]
    classes: tuple[str, ...]
    settings: dict[str, Any]
    split: str = ""

    def __str__(self) -> str:
        train, validation = self.counts
        line = f"{self.form}, {train} training and {validation} validation images, {len(self.classes)} classes"
        return line + (f"; {self.split}" if self.split else "")


@dataclass(frozen=True)
class _Request:
    """Where the data are, where converted files go, and how validation images are chosen where nobody has."""

    root: Path
    work: Path
    share: float
    seed: int
    overwrite: bool

    def write(self, part: str, data: dict[str, Any]) -> str:
        """Writes an annotation file; returns its path."""
        path, text = self.work / f"{part}.json", json.dumps(data)
        if path.is_file() and path.read_text() != text:
            self.check_overwrite(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        with write_atomically(path, "w") as file:
            file.write(text)
        return str(path.absolute())

    def link(self, part: str, pairs: Sequence[Pair]) -> tuple[Path, Path]:
        """Folders of links to the images and label maps of a part."""
        base = self.work / part
        wanted = {
            base / kind / f"{pair.name}{source.suffix}": source.absolute()
            for pair in pairs
            for kind, source in (("images", Path(pair.image)), ("labels", Path(pair.labels)))
        }
        for link in [path for path in base.rglob("*") if path.is_symlink() and path not in wanted]:
            self.check_overwrite(link)
            link.unlink()
        for link, source in wanted.items():
            link.parent.mkdir(parents=True, exist_ok=True)
            if not link.is_symlink():
                link.symlink_to(source)
        return base / "images", base / "labels"

    def check_overwrite(self, path: Path) -> None:
        if not self.overwrite:
            raise DatasetError(f"{path}: the data set has changed since: name another --output, or put it back")

    @property
    def split(self) -> str:
        return f"{self.share:.0%} chosen for validation (seed {self.seed})" if self.share else ""

    def divide(self, items: Sequence[Any]) -> tuple[list[Any], list[Any]]:
        """The items for training and for validation, each in their order."""
        if not self.share:
            return list(items), []
        if len(items) < 2:
            raise DatasetError(f"{self.root}: {len(items)} image(s): expected at least two, to train and to validate")
        count = min(max(round(self.share * len(items)), 1), len(items) - 1)
        chosen = set(random.Random(self.seed).sample(range(len(items)), count))
        return [x for k, x in enumerate(items) if k not in chosen], [items[k] for k in sorted(chosen)]


def read_folder(
    folder: str | Path,
    work: str | Path,
    *,
    form: str | None = None,
    share: float = 0.2,
    seed: int = 0,
    overwrite: bool = True,
) -> OwnData:
    """Recognises a folder by its content, and makes what the project's readers need of it.

    COCO's format is read as it is. YOLO and Pascal VOC are written to `work` as annotation files in COCO's format, and
    so is the split of a data set that has none. Nothing is written to `folder`.

    Args:
        folder: The data set, or the `data.yaml` of a YOLO one.
        work: Folder for what is converted.
        form: One of `FORMS`, where a folder could be several.
        share: Part of the images held out for validation where there are none; 0: none.
        seed: Of that choice.
        overwrite: Whether what an earlier call wrote may be replaced by something else.

    Raises:
        DatasetError: If it is of no form, or of several, or a file in it cannot be used.
    """
    root = Path(folder)
    if root.is_file() and root.suffix in (".yaml", ".yml"):
        root, form = root.parent, form or "yolo"
    if Path(work).resolve().is_relative_to(root.resolve()):
        raise DatasetError(f"{work}: lies in the data set: name another --output")
    if not root.is_dir():
        raise DatasetError(f"{folder}: no such folder (looked from {Path.cwd()}): expected a data set")
    inner = [path for path in root.iterdir() if path.name[0] != "." and path.name != "__MACOSX"]
    if not inner:
        raise DatasetError(f"{folder}: the folder is empty: expected a data set")
    if len(inner) == 1 and inner[0].is_dir() and not next(_images(inner[0]), None):  # as archives unpack
        return read_folder(inner[0], work, form=form, share=share, seed=seed, overwrite=overwrite)
    check(0 <= share < 1, "--validation", share, "a part of the images, from 0 to below 1")
    check(form is None or form in FORMS, "--format", form, f"one of {', '.join(FORMS)}")
    found = [form] if form else [name for name, (recognise, _) in FORMS.items() if recognise(root)]
    if found != ["classes"] and not form:
        found = [name for name in found if name != "classes"]  # any sub-folders with images look like classes
    if len(found) > 1:
        raise DatasetError(f"{folder}: could be {' or '.join(found)}: say which by --format")
    if not found:
        raise DatasetError(
            f"{folder}: holds none of the forms that are known: COCO (annotations/*.json or */{_ROBOFLOW}), YOLO "
            "(data.yaml), Pascal VOC (Annotations/*.xml), label maps (images/ and masks/*.png), a folder per class"
        )
    return FORMS[found[0]][1](_Request(root, Path(work), share, seed, overwrite))


# ---- COCO, and what is converted to it ----


def _find_coco(root: Path) -> list[Path]:
    """Annotation files: of a Roboflow export, COCO's layout, or beside the images."""
    found = sorted(root.glob(f"*/{_ROBOFLOW}")) or sorted(root.glob("annotations/*.json"))
    found = [path for path in found if path.name.startswith("instances")] or found
    return found or [path for path in sorted(root.glob("*.json")) if b'"images"' in path.read_bytes()]


def _read_coco(request: _Request) -> OwnData:
    root, parts = request.root, {}
    files = _find_coco(root)
    for part, words in (("train", _TRAIN), ("val", _VALIDATION)):
        for word in words:
            named = [path for path in files if word in (path.parent.name if path.name == _ROBOFLOW else path.stem)]
            if len(named) > 1 and part not in parts:
                raise DatasetError(f"{root}: several files for {word}: {first_few([str(path) for path in named])}")
            if named and named[0] not in parts.values():
                parts.setdefault(part, named[0])
    if "train" not in parts:
        rest = [path for path in files if path not in parts.values()] or files
        if len(rest) > 1:
            raise DatasetError(f"{root}: no file for train among {first_few([str(path) for path in rest])}")
        if not rest:
            raise DatasetError(f"{root}: no annotation file in COCO's format")
        parts = {"train": rest[0], **{key: path for key, path in parts.items() if path != rest[0]}}
    read = {}
    for part, path in parts.items():
        coco_categories(str(path))  # checks that images and categories are lists
        data = read_coco(str(path))
        read[part] = data, _image_folder(root, path, data["images"][0])
    names = {part: str(path) for part, path in parts.items()}
    return _coco_data("COCO", request, read, names)


def _image_folder(root: Path, path: Path, image: Any) -> Path:
    """The folder that an image of an annotation file is in."""
    if path.name == _ROBOFLOW:
        return path.parent
    part, name = path.stem.removeprefix("instances_"), str(image.get("file_name") if isinstance(image, dict) else image)
    for folder in (root / part, root / "images" / part, root / "images", path.parent, root):
        if (folder / name).is_file():
            return folder
    raise DatasetError(f"{path}: its first image, {name}, is in none of {part}/, images/{part}/ and images/ of {root}")


def _coco_data(
    form: str, request: _Request, parts: dict[str, tuple[dict[str, Any], Path]], files: dict[str, str] | None = None
) -> OwnData:
    """Settings of data in COCO's format by part, "train" and "val"; those without `files` are written."""
    split, files = "", dict(files or {})
    if "val" not in parts and request.share:
        data, images = parts["train"]
        if files:  # what was converted is checked when it is read
            get_coco_dicts(files["train"], str(images), filter_empty=False)
        divided, split, files = request.divide(data["images"]), request.split, {}
        parts = {name: (_subset(data, part), images) for name, part in zip(("train", "val"), divided, strict=True)}
    for part, (data, _) in parts.items():
        if not data.get("annotations"):
            raise DatasetError(f"{request.root}: {part}: {len(data['images'])} images without an object: expected some")
        if part not in files:
            files[part] = request.write(part, data)
    settings: dict[str, Any] = {"data.test.annotations": None}
    for part, key in (("train", "train"), ("val", "test")):
        if part in parts:
            settings |= {f"data.{key}.annotations": files[part], f"data.{key}.images": str(parts[part][1].absolute())}
    masks = all(_has_masks(data) for data, _ in parts.values())
    counts = [len(parts[part][0]["images"]) if part in parts else 0 for part in ("train", "val")]
    classes = tuple(category.name for category in coco_categories(files["train"]))
    return OwnData(form, "segment" if masks else "detect", (counts[0], counts[1]), classes, settings, split)


def _subset(data: dict[str, Any], images: Sequence[dict[str, Any]]) -> dict[str, Any]:
    ids = {image["id"] for image in images}
    kept = [annotation for annotation in data.get("annotations", []) if annotation.get("image_id") in ids]
    return {"images": list(images), "categories": data.get("categories"), "annotations": kept}


def _has_masks(data: dict[str, Any]) -> bool:
    """Whether all objects, and at least one, have a mask."""
    objects = [each for each in data.get("annotations", []) if isinstance(each, dict) and not each.get("iscrowd")]
    return bool(objects) and all(annotation.get("segmentation") for annotation in objects)


def _converted(form: str, read: Callable[[Path], dict[str, tuple[dict[str, Any], Path]]]) -> Callable[..., OwnData]:
    return lambda request: _coco_data(form, request, read(request.root))


# ---- Label maps, and folders of classes ----


def _part(root: Path, words: Sequence[str]) -> str | None:
    """Name of the first sub-folder of `root` that is one of the words."""
    return next((word for word in words if (root / word).is_dir()), None)


def _find_maps(root: Path) -> dict[str, tuple[Path, Path]]:
    """Images and label maps by part: images/train with masks/train, train/images with train/masks, or images, masks."""
    found: dict[str, tuple[Path, Path]] = {}
    for part, words in (("train", _TRAIN), ("val", _VALIDATION), ("all", ("",))):
        for word in words:
            for images, labels in (
                (root / "images" / word, [root / name / word for name in _LABELS]),
                (root / word / "images", [root / word / name for name in _LABELS]),
            ):
                masks = [folder for folder in labels if next(folder.glob("*.png"), None)]
                if images.is_dir() and masks:
                    found.setdefault(part, (images, masks[0]))
    return found if "train" in found else {"train": found["all"]} if "all" in found else {}


def _read_maps(request: _Request) -> OwnData:
    root, parts = request.root, _find_maps(request.root)
    if not parts:
        raise DatasetError(f"{root}: expected folders images/ and masks/ with label maps that end in .png")
    pairs = {part: find_pairs(*map(str, folders)) for part, folders in parts.items() if part != "all"}
    file = next((root / name for name in _NAMES if (root / name).is_file()), None)
    classes = label_classes(str(file) if file else _count_classes([pair for part in pairs.values() for pair in part]))
    split = ""
    if "val" not in pairs and request.share:
        divided, split = request.divide(pairs["train"]), request.split
        pairs = dict(zip(("train", "val"), divided, strict=True))
        parts = {part: request.link(part, chosen) for part, chosen in pairs.items()}
    settings: dict[str, Any] = {"data.classes": list(classes.names), "data.test.labels": None}
    for part, key in (("train", "train"), ("val", "test")):
        if part in pairs:
            images, labels = (str(path.absolute()) for path in parts[part])
            settings |= {f"data.{key}.images": images, f"data.{key}.labels": labels}
    counts = len(pairs["train"]), len(pairs.get("val", ()))
    return OwnData("label maps", "semantic", counts, classes.names, settings, split)


def _count_classes(pairs: Sequence[Pair]) -> int:
    """One more than the largest value in the label maps, 255 left aside."""
    every, largest = label_classes(IGNORE_LABEL), 0
    for pair in pairs:
        labels = read_label_map(pair.labels, every)
        largest = max(largest, int(labels[labels != IGNORE_LABEL].max(initial=0)))
    if not largest:
        raise DatasetError(
            f"{os.path.dirname(pairs[0].labels)}: only 0 and {IGNORE_LABEL} (pixels to ignore) in the label maps: "
            "expected the values of at least two classes, 1 instead of 255 for the objects of a mask, or names.txt"
        )
    return largest + 1


def _images(folder: Path) -> Iterator[Path]:
    return (path for path in folder.iterdir() if path.suffix.lower() in image_endings())


def _find_classes(root: Path) -> bool:
    """Whether there are at least two sub-folders with images, of the training part if there is one."""
    base = root / (_part(root, _TRAIN) or "")
    folders = [folder for folder in base.iterdir() if folder.is_dir() and next(_images(folder), None)]
    return len(folders) > 1 and not {folder.name for folder in folders} & {"images", "JPEGImages", *_LABELS, *_TRAIN}


def _read_classes(request: _Request) -> OwnData:
    train, validation = _part(request.root, _TRAIN), _part(request.root, _VALIDATION)
    images = str((request.root / (train or "")).absolute())
    test = str((request.root / validation).absolute()) if train and validation else None
    share = 0.0 if test else request.share
    settings = {"data.train.images": images, "data.test.images": test, "data.test.share": share}
    counts = len(get_train_dicts(images, share=share)), 0
    if test or share:
        counts = counts[0], len(get_test_dicts(test, train_images=images, share=share))
    names = tuple(category.name for category in folder_categories(images))
    split = f"{share:.0%} of every class for validation" if share else ""
    return OwnData("folders of classes", "classify", counts, names, settings, split)


FORMS: dict[str, tuple[Callable[[Path], Any], Callable[[_Request], OwnData]]] = {
    "coco": (_find_coco, _read_coco),
    "yolo": (find_yolo, _converted("YOLO", read_yolo)),
    "voc": (find_voc, _converted("Pascal VOC", read_voc)),
    "maps": (_find_maps, _read_maps),
    "classes": (_find_classes, _read_classes),
}
"""By name: whether a folder is of that form, and how it is read."""
