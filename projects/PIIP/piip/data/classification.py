"""Image classification data: folders with one sub-folder of images per class, the mapper, the evaluator."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from detectron2.evaluation import DatasetEvaluator
from detectron2.utils import comm
from detectron2.utils.file_io import PathManager
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from piip_core.files import write_atomically
from piip_core.images import image_endings

from .dataset import (
    Category,
    DatasetError,
    check_num_classes,
    check_same_classes,
    existing_folder,
    find_files,
    first_few,
    leads_up,
    read_image,
    warn_left_out,
)
from .mapper import CheckedDatasetMapper

logger = logging.getLogger(__name__)

PREDICTIONS = "classification_predictions.json"
"""What `TopKEvaluator` writes."""

_EXPECTED = "one sub-folder of images per class (FOLDER/dog/1.jpg, FOLDER/cat/2.jpg)"


def folder_categories(images: str) -> tuple[Category, ...]:
    """Classes of a folder: its sub-folders in the order of their names, as torchvision's `ImageFolder` has them.

    Hidden sub-folders are none. Accents in names are composed, in whichever of Unicode's forms the folder has them.

    Raises:
        DatasetError: If there is no such folder, or no class in it, or two whose names look alike.
    """
    return tuple(Category(index, name) for index, name in enumerate(_class_folders(images)))


def get_train_dicts(images: str, *, share: float = 0.0, num_classes: int | None = None) -> list[dict[str, Any]]:
    """Training images of a folder, without the `share` that is held out: see `get_test_dicts`.

    Args:
        images: Folder with one sub-folder per class; folders in those count, hidden files do not.
        share: Part of every class that is held out.
        num_classes: If given, the number of classes that there must be.

    Returns:
        One dict per image with file_name and label, in the order of classes and names.

    Raises:
        DatasetError: If the folder, a class in it or an argument cannot be used.
    """
    return _divided(images, share, num_classes)[0]


def get_test_dicts(
    images: str | None, *, train_images: str = "", share: float = 0.0, num_classes: int | None = None
) -> list[dict[str, Any]]:
    """Test images: of a folder of their own, or held out of the training images; otherwise as `get_train_dicts`.

    Of every class with n images, round(share * n) are held out, at least one and at most n - 1: those that come first
    in the order of the SHA-256 of their path below the folder. So the choice is arbitrary, and stays when images of
    other classes are added.

    Args:
        images: Folder with the same sub-folders as `train_images`; not read if `share` is not 0.
        train_images: Folder of the training images.
        share: Part of every class that is held out.
        num_classes: If given, the number of classes that there must be.
    """
    if share:
        return _divided(train_images, share, num_classes)[1]
    if os.path.isdir(PathManager.get_local_path(train_images)):
        try:
            check_same_classes(train_images, folder_categories(train_images), images, folder_categories(images))
        except DatasetError as error:  # the model may have been trained on others
            logger.warning("%s", error)
    return _divided(images, share, num_classes)[0]


def list_images(images: str) -> list[tuple[str, int]]:
    """Path and index of the class of every image in the sub-folders; hidden files are left out, others counted."""
    folders, root = _class_folders(images), PathManager.get_local_path(images)
    found, others = [], []
    for label, folder in enumerate(tqdm(folders.values(), f"Listing {images}", unit="class", delay=2, disable=None)):
        paths, more = find_files(folder, image_endings())
        found += [(path, label) for path in paths]
        others += more
    warn_left_out(images, "images", others)
    with os.scandir(root) as entries:
        loose = sorted(entry.path for entry in entries if not entry.name.startswith(".") and os.path.isfile(entry.path))
    if loose:
        logger.warning("%s: %d files lie in no class and are left out: %s", images, len(loose), first_few(loose))
    return found


class ClassificationMapper(CheckedDatasetMapper):
    """Reads an image, EXIF rotation applied, and transforms it.

    `transform` makes a uint8 tensor (3, H, W) of a PIL image, as timm's `create_transform(..., use_prefetcher=True)`
    does: the model normalises. The rest is given as to `CheckedDatasetMapper`.
    """

    def __init__(
        self,
        is_train: bool,
        *,
        transform: Callable[[Image.Image], torch.Tensor],
        image_format: str = "RGB",
        **kwargs: Any,
    ) -> None:
        super().__init__(is_train, augmentations=[], image_format=image_format, **kwargs)
        self.transform = transform

    def map_record(self, dataset_dict: dict[str, Any]) -> dict[str, Any]:
        """Makes a sample: "image" (3, H, W) uint8, beside what the record holds ("file_name", "label")."""
        image = Image.fromarray(read_image(dataset_dict["file_name"], self.image_format))
        return {**dataset_dict, "image": torch.as_tensor(self.transform(image))}


class TopKEvaluator(DatasetEvaluator):
    """Share of the images, in percent, whose class is among the k with the highest scores.

    Every image counts once, whatever the number of processes: Detectron2's test loader deals them out without filling
    up the last batches.

    Args:
        topk (Sequence[int]): the k; above the number of classes they give 100.
        output_dir (str | None): folder for `PREDICTIONS`, a list with file_name, label, predicted and score (softmax
            over all classes) of every image; None writes nothing.
    """

    def __init__(self, topk: Sequence[int] = (1, 5), output_dir: str | None = None) -> None:
        self.topk, self._output_dir = tuple(topk), output_dir
        self.reset()

    def reset(self) -> None:
        """Forgets all images."""
        self._images, self._hits = 0, dict.fromkeys(self.topk, 0)
        self._predictions: list[dict[str, Any]] = []

    def process(self, inputs: Sequence[Mapping[str, Any]], outputs: Sequence[Mapping[str, Tensor]]) -> None:
        """Counts a batch: "label" of its inputs, the index of the class, and "scores" (num_classes,) of its outputs."""
        scores = torch.stack([output["scores"] for output in outputs])
        if scores.isnan().any():
            raise ValueError(f"scores of {inputs[0].get('file_name', 'an image')} or after it are not numbers (NaN)")
        labels = torch.tensor([entry["label"] for entry in inputs], device=scores.device)
        best = scores.topk(min(max(self.topk), scores.shape[1])).indices == labels[:, None]
        self._images += len(labels)
        for k in self.topk:
            self._hits[k] += int(best[:, :k].sum())
        if self._output_dir:
            values, classes = scores.float().softmax(dim=1).max(dim=1)
            found = zip(inputs, classes.tolist(), values.tolist(), strict=True)
            self._predictions += [
                {"file_name": entry["file_name"], "label": entry["label"], "predicted": predicted, "score": score}
                for entry, predicted, score in found
            ]

    def evaluate(self) -> dict[str, dict[str, float]] | None:
        """{"classification": {"top1": ..., "top5": ...}} on the first process, None on others; all call it."""
        parts = comm.gather((self._images, self._hits, self._predictions))
        if not comm.is_main_process():
            return None
        if self._output_dir:
            os.makedirs(self._output_dir, exist_ok=True)
            with write_atomically(os.path.join(self._output_dir, PREDICTIONS), "w") as file:
                json.dump([entry for *_, predictions in parts for entry in predictions], file)
        images, hits = sum(count for count, *_ in parts), [found for _, found, _ in parts]
        return {
            "classification": {f"top{k}": 100.0 * sum(each[k] for each in hits) / max(images, 1) for k in self.topk}
        }


def _class_folders(images: str) -> dict[str, str]:
    """Name and path of every class, in the order of the names."""
    root = existing_folder(images, _EXPECTED)
    with os.scandir(root) as entries:
        found = [entry for entry in entries if not entry.name.startswith(".") and os.path.isdir(entry.path)]
    found = [entry for entry in found if not leads_up(entry.path)]
    if not found:
        raise DatasetError(f"{images}: has no sub-folders: expected {_EXPECTED}")
    folders = {unicodedata.normalize("NFC", entry.name): entry.path for entry in found}
    if len(folders) < len(found):
        alike = [entry.path for entry in found if entry.path not in folders.values()]
        raise DatasetError(
            f"{images}: {len(alike)} sub-folders have the name of another one, with accents in Unicode's other form: "
            f"{first_few(alike)}: expected one per class; put their images together"
        )
    return dict(sorted(folders.items()))


def _divided(images: str, share: float, num_classes: int | None) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Records to train on, and held-out ones."""
    folders = _class_folders(images)
    check_num_classes(len(folders), f"{images}: {len(folders)} classes (sub-folders)", num_classes)
    if not 0 <= share < 1:
        raise DatasetError(f"data.test.share={share}: expected a part of the training images, from 0 to below 1")
    by_class: list[list[str]] = [[] for _ in folders]
    for path, label in _list_once(images, tuple((path, os.stat(path).st_mtime_ns) for path in folders.values())):
        by_class[label].append(path)
    empty = [name for name, paths in zip(folders, by_class, strict=True) if not paths]
    if empty:
        raise DatasetError(
            f"{images}: {len(empty)} of {len(folders)} classes (sub-folders) have no image: {first_few(empty)}: "
            "expected files that end in .jpg, .png or another ending of images that Pillow reads; remove such folders "
            "or fill them"
        )
    train, held_out = [], []
    for label, paths in enumerate(by_class):
        chosen: set[str] = set()
        if share:
            if len(paths) < 2:
                raise DatasetError(
                    f"{os.path.dirname(paths[0])}: one image, none to hold out (data.test.share={share}): expected at "
                    "least two images in every class"
                )
            count = min(max(round(share * len(paths)), 1), len(paths) - 1)
            names = {path: Path(os.path.relpath(path, images)).as_posix() for path in paths}
            chosen.update(sorted(paths, key=lambda path: hashlib.sha256(names[path].encode()).digest())[:count])
        for path in paths:
            (held_out if path in chosen else train).append({"file_name": path, "label": label})
    return train, held_out


@lru_cache(maxsize=4)  # asked for several times, and listing ImageNet on a network disk takes a while
def _list_once(images: str, changed: tuple[tuple[str, int], ...]) -> list[tuple[str, int]]:
    return list_images(images)
