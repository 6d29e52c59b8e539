"""A folder with one sub-folder of images per class as a data set in Detectron2's form."""

from __future__ import annotations

import hashlib
import logging
import os
import unicodedata
from functools import lru_cache
from typing import Any

from detectron2.utils.file_io import PathManager
from tqdm import tqdm

from piip_core.images import image_endings

from ..dataset import Category, DatasetError, check_num_classes, check_same_classes, existing_folder, first_few
from ..files import find_files, leads_up, named_endings, warn_left_out

__all__ = [
    "folder_categories",
    "get_test_dicts",
    "get_train_dicts",
    "list_images",
]

logger = logging.getLogger(__name__)

_EXPECTED = "one sub-folder of images per class (FOLDER/dog/1.jpg, FOLDER/cat/2.jpg)"


def folder_categories(images: str) -> tuple[Category, ...]:
    """Classes of a folder: its sub-folders in the order of their names, as torchvision's `ImageFolder` has them.

    Hidden sub-folders are none. Accents in names are composed, in whichever of Unicode's forms the folder has them.

    Raises:
        DatasetError: If there is no such folder, or no class in it, or two whose names look alike.
    """
    return tuple(Category(index, name) for index, name in enumerate(_class_folders(images)))


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
    folder = train_images if share else images
    train, held_out = _divided(folder, share, num_classes)
    if not share and os.path.isdir(PathManager.get_local_path(train_images)):
        try:
            check_same_classes(train_images, folder_categories(train_images), images, folder_categories(images))
        except DatasetError as error:  # the model may have been trained on others
            logger.warning("%s", error)
    return held_out if share else train


def _divided(images: str, share: float, num_classes: int | None) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Records to train on, and held-out ones."""
    number = len(folder_categories(images))
    check_num_classes(number, f"{images}: {number} classes (sub-folders)", num_classes)
    if not 0 <= share < 1:
        raise DatasetError(f"data.test.share={share}: expected a part of the training images, from 0 to below 1")
    by_class: dict[int, list[str]] = {}
    for path, label in _read(images):
        by_class.setdefault(label, []).append(path)
    train, held_out = [], []
    for label, paths in by_class.items():
        chosen: set[str] = set()
        if share:
            if len(paths) < 2:
                raise DatasetError(
                    f"{os.path.dirname(paths[0])}: one image, none to hold out (data.test.share={share}): expected at "
                    "least two images in every class"
                )
            count = min(max(round(share * len(paths)), 1), len(paths) - 1)
            chosen.update(sorted(paths, key=lambda path: _digest(os.path.relpath(path, images)))[:count])
        for path in paths:
            (held_out if path in chosen else train).append({"file_name": path, "label": label})
    return train, held_out


def _digest(path: str) -> bytes:
    return hashlib.sha256(path.replace(os.sep, "/").encode()).digest()


def _read(images: str) -> list[tuple[str, int]]:
    """Path and class of every image."""
    folders = _class_folders(images)
    changed = tuple(os.stat(path).st_mtime_ns for path in folders.values())
    return _read_classes(images, tuple(folders), changed)


@lru_cache(maxsize=4)  # asked for several times, and listing ImageNet on a network disk takes a while
def _read_classes(images: str, names: tuple[str, ...], changed: tuple[int, ...]) -> list[tuple[str, int]]:
    del changed  # part of the key
    found = list_images(images)
    labels = {label for _, label in found}
    empty = [name for label, name in enumerate(names) if label not in labels]
    if empty:
        raise DatasetError(
            f"{images}: {len(empty)} of {len(names)} classes (sub-folders) have no image: {first_few(empty)}: expected "
            f"files that end in {named_endings(image_endings())}; remove such folders or fill them"
        )
    return found


def list_images(images: str) -> list[tuple[str, int]]:
    """Path and index of the class of every image in the sub-folders; hidden files are left out, others counted."""
    folders, root = _class_folders(images), PathManager.get_local_path(images)
    found, others = [], []
    for label, folder in enumerate(
        tqdm(folders.values(), desc=f"Listing {images}", unit="class", delay=2, disable=None)
    ):
        paths, more = find_files(folder, image_endings())
        found += [(path, label) for path in paths]
        others += more
    warn_left_out(images, "images", others)
    with os.scandir(root) as entries:
        loose = sorted(entry.path for entry in entries if not entry.name.startswith(".") and os.path.isfile(entry.path))
    if loose:
        logger.warning("%s: %d files lie in no class and are left out: %s", images, len(loose), first_few(loose))
    return found
