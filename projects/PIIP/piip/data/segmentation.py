"""Semantic segmentation data: folders of images and label maps, the mapper, the evaluator."""

from __future__ import annotations

import logging
import os
import unicodedata
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.evaluation import SemSegEvaluator

from piip_core.images import UnreadableImageError, image_endings

from .dataset import (
    READERS,
    DatasetError,
    check_num_classes,
    existing_folder,
    find_files,
    first_few,
    read_all,
    read_image_size,
    warn_left_out,
)
from .label_maps import IGNORE_LABEL, LABEL_ENDING, LabelClasses, label_classes, read_label_map, read_label_size
from .mapper import CheckedDatasetMapper

logger = logging.getLogger(__name__)

_LOOKED_AT = 2000  # label maps that are read for their classes, at most
_REPEATED = (
    "names of several images or label maps, which differ in the ending or in the spelling of accents and folders"
)
_LEFT_OVER = "label maps without an image"


class Pair(NamedTuple):
    """Paths of an image and its label map, and what both have in common: the path below their folder.

    The `name` has no ending, composed accents and slashes.
    """

    name: str
    image: str
    labels: str


def match_files(images: str, labels: str) -> tuple[list[Pair], dict[str, list[str]]]:
    """Looks for images and their label maps by equal names; subfolders count, hidden files do not.

    Names that differ in Unicode's form of accents only are equal, and a back-slash is as good as a subfolder.

    Returns:
        Images with their label maps in the order of the names, and what is wrong with others: paths by kind.

    Raises:
        DatasetError: If a folder is missing or empty, or both are the same.
    """
    by_name, repeated = _files(images, image_endings(), "images")
    maps, more = _files(labels, (LABEL_ENDING,), "labels")
    if os.path.realpath(images) == os.path.realpath(labels):
        raise DatasetError(f"{images}: images and label maps are in the same folder: expected two")
    pairs = [Pair(name, by_name[name], maps[name]) for name in sorted(by_name) if name in maps]
    return pairs, {
        _REPEATED: repeated + more,
        f"images have no label map of the same name that ends in {LABEL_ENDING}": [
            by_name[name] for name in sorted(by_name) if name not in maps
        ],
        _LEFT_OVER: [maps[name] for name in sorted(maps) if name not in by_name],
    }


def find_pairs(images: str, labels: str) -> list[Pair]:
    """Images and their label maps, all of them; see `match_files`.

    Raises:
        DatasetError: Also if an image has no label map, or two images or label maps have the same name.
    """
    pairs, problems = match_files(images, labels)
    for kind, paths in problems.items():
        if paths and kind != _LEFT_OVER:
            raise DatasetError(f"{images}, {labels}: {len(paths)} {kind}: {first_few(paths)}")
        if paths:
            logger.warning("%s: %d %s, left out: %s", labels, len(paths), kind, first_few(paths))
    return pairs


def get_sem_seg_dicts(
    images: str,
    labels: str,
    *,
    classes: str | int | Sequence[str],
    reduce_zero_label: bool | None = None,
    num_classes: int | None = None,
) -> list[dict[str, Any]]:
    """Loads a folder of images and a folder of label maps in Detectron2's standard form, after checking them.

    Of the images only the headers are read; label maps are read until every class was seen, at most 2000 of them. A
    class that was not is warned about.

    Args:
        images: Folder of images; subfolders count.
        labels: Folder of label maps: PNG files of one channel, named as the images.
        classes: As in `label_classes`, with `reduce_zero_label`.
        reduce_zero_label: See `classes`.
        num_classes: If given, the number that `classes` must have.

    Returns:
        One dict per image with file_name, sem_seg_file_name, image_id, height and width, in the order of the names.

    Raises:
        UserError: If a folder, the classes, a file or a pair of files cannot be used, or a value in one of the label
            maps that are read stands for nothing; the message names it.
    """
    known = label_classes(classes, reduce_zero_label)
    check_num_classes(known.num_classes, f"{known.num_classes} classes", num_classes)
    pairs = find_pairs(images, labels)

    def read_sizes(pair: Pair) -> tuple[tuple[int, int], tuple[int, int]]:
        return read_image_size(pair.image), read_label_size(pair.labels)

    sizes = list(read_all(read_sizes, pairs, f"Checking {images}", READERS))
    different = [
        f"{pair.labels} is {label}, its image {image}"
        for pair, (image, label) in zip(pairs, sizes, strict=True)
        if image != label
    ]
    if different:
        raise DatasetError(
            f"{labels}: {len(different)} label maps have another size (height, width, after EXIF rotation) than their "
            f"image: {first_few(different)}"
        )
    _warn_absent(labels, pairs, known)
    return [
        {
            "file_name": pair.image,
            "sem_seg_file_name": pair.labels,
            "image_id": pair.name,
            "height": height,
            "width": width,
        }
        for pair, ((height, width), _) in zip(pairs, sizes, strict=True)
    ]


class SemSegDatasetMapper(CheckedDatasetMapper):
    """Reads an image and, for training, its label map, and augments both together.

    Classes are given as to `label_classes`, the rest as to `CheckedDatasetMapper`; `on_bad_image` holds for label maps
    that cannot be read, too. Samples for tests hold no labels: the evaluator reads them itself.
    """

    def __init__(
        self,
        is_train: bool,
        *,
        classes: str | int | Sequence[str],
        reduce_zero_label: bool | None = None,
        image_format: str = "RGB",
        **kwargs: Any,
    ) -> None:
        super().__init__(is_train, image_format=image_format, **kwargs)
        self.classes = label_classes(classes, reduce_zero_label)

    def read_labels(self, sample: dict[str, Any], image: np.ndarray) -> np.ndarray | None:
        """Label map (H, W) uint8 for training, with 255 to ignore; "sem_seg" (H, W) int64 of the sample."""
        path = sample.pop("sem_seg_file_name", None)
        if not self.is_train:
            return None
        labels = read_label_map(path, self.classes)
        if labels.shape != image.shape[:2]:
            sizes = f"{labels.shape} (h, w), its image {image.shape[:2]} after EXIF rotation"
            raise DatasetError(f"{path}: {sizes}: expected one size")
        return labels


class _LabelMapEvaluator(SemSegEvaluator):
    """Detectron2's evaluator, which also says of how many classes mIoU is the mean."""

    def __init__(self, name: str, classes: LabelClasses, **kwargs: Any) -> None:
        super().__init__(name, **kwargs)
        self._classes = classes

    def encode_json_sem_seg(self, sem_seg: np.ndarray, input_file_name: str) -> list[dict[str, Any]]:
        """As `SemSegEvaluator`, for sem_seg_predictions.json; "sem_seg_file_name" is that of the label map."""
        entries = super().encode_json_sem_seg(sem_seg, input_file_name)
        return [{**entry, "sem_seg_file_name": self.input_file_to_gt_file[input_file_name]} for entry in entries]

    def evaluate(self) -> dict[str, dict[str, float]] | None:
        """As `SemSegEvaluator`; "classes in mIoU" beside "mIoU" is the number of classes that label maps show."""
        results = super().evaluate()
        if results is None:  # not the first process
            return None
        scores = results["sem_seg"]
        shown = [not np.isnan(scores[f"IoU-{name}"]) for name in self._classes.names]
        absent = self._classes.absent(np.array([*shown, True]))
        if absent:
            logger.warning("mIoU is the mean over %d of %d classes: %s", sum(shown), len(shown), absent)
        return {**results, "sem_seg": {"mIoU": scores["mIoU"], "classes in mIoU": float(sum(shown)), **scores}}


def build_sem_seg_evaluator(
    images: str,
    labels: str,
    *,
    classes: str | int | Sequence[str],
    reduce_zero_label: bool | None = None,
    **kwargs: Any,
) -> SemSegEvaluator:
    """Detectron2's evaluator (mIoU, mean and overall pixel accuracy) for label maps, read as for training.

    A class that no label map shows is left out of the means, and a warning says so. Folders and classes are given as to
    `get_sem_seg_dicts`, and refused for the same reasons; `kwargs` are of `SemSegEvaluator`, such as `output_dir`.
    """
    known = label_classes(classes, reduce_zero_label)
    name = f"label_maps:{os.path.abspath(images)}:{os.path.abspath(labels)}"
    records = [{"file_name": p.image, "sem_seg_file_name": p.labels} for p in find_pairs(images, labels)]
    # Made afresh: folders and classes may have changed since the last call
    for catalog in (DatasetCatalog, MetadataCatalog):
        if name in catalog.list():
            catalog.remove(name)
    DatasetCatalog.register(name, lambda: records)
    MetadataCatalog.get(name).set(
        evaluator_type="sem_seg",
        ignore_label=IGNORE_LABEL,
        stuff_classes=list(known.names),
        stuff_dataset_id_to_contiguous_id={category.id: k for k, category in enumerate(known.categories)},
    )

    def load(path: str, dtype: Any = int) -> np.ndarray:
        return read_label_map(path, known).astype(dtype)

    return _LabelMapEvaluator(name, known, sem_seg_loading_fn=load, **kwargs)


def _files(folder: str, endings: Sequence[str], what: str) -> tuple[dict[str, str], list[str]]:
    """Name -> path of the files with one of the endings, and names that several of them have."""
    root = existing_folder(folder, f"a folder of {what}", what)
    files, others = find_files(root, endings)
    if not files:
        seen = f"; there are {len(others)} other files, such as {others[0]}" if others else ""
        named = ".jpg, .png or another ending of images that Pillow reads" if len(endings) > 1 else endings[0]
        raise DatasetError(f"{folder}: no {what}: expected files that end in {named}{seen}")
    warn_left_out(folder, what, others)
    found: dict[str, str] = {}
    repeated = []
    for path in files:
        stem = os.path.splitext(os.path.relpath(path, root))[0]
        name = unicodedata.normalize("NFC", stem).replace("\\", "/")
        if found.setdefault(name, path) != path:
            repeated.append(name)
    return found, sorted(repeated)


def _warn_absent(labels: str, pairs: Sequence[Pair], classes: LabelClasses) -> None:
    """Reads label maps, in an order that is random but the same every time, until every class was seen."""
    order = np.random.default_rng(0).permutation(len(pairs))[:_LOOKED_AT]
    pixels = np.zeros(IGNORE_LABEL + 1, dtype=np.int64)

    def count(index: int) -> np.ndarray:
        try:
            return np.bincount(read_label_map(pairs[index].labels, classes).reshape(-1), minlength=IGNORE_LABEL + 1)
        except UnreadableImageError:  # which training stops at, or skips
            return np.zeros(IGNORE_LABEL + 1, dtype=np.int64)

    for counts in read_all(count, order, f"Looking for classes in {labels}", READERS):
        pixels += counts
        if pixels[: classes.num_classes].all():
            return
    looked = "all" if len(order) == len(pairs) else f"{len(order)} of"
    logger.warning("%s: %s (%s %d were looked at)", labels, classes.absent(pixels), looked, len(pairs))
