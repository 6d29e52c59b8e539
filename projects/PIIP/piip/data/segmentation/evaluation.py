"""Detectron2's evaluator of semantic segmentation for a folder of images and a folder of label maps."""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Sequence
from typing import Any

import numpy as np
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.evaluation import SemSegEvaluator

from .classes import IGNORE_LABEL, LabelClasses, label_classes
from .folders import find_pairs
from .label_maps import read_label_map

__all__ = ["LabelMapEvaluator", "build_sem_seg_evaluator"]

logger = logging.getLogger(__name__)


class LabelMapEvaluator(SemSegEvaluator):
    """Detectron2's evaluator, which also says of how many classes mIoU is the mean.

    Args:
        name: Of the data set in Detectron2's catalogs.
        classes: The classes.
        kwargs: Other arguments of `SemSegEvaluator`.
    """

    def __init__(self, name: str, classes: LabelClasses, **kwargs: Any) -> None:
        super().__init__(name, **kwargs)
        self._classes = classes

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
) -> LabelMapEvaluator:
    """Detectron2's evaluator (mIoU, mean and overall pixel accuracy) for label maps, read as for training.

    A class that no label map shows is left out of the means, and a warning says so.

    Args:
        images: Folder of images.
        labels: Folder of label maps.
        classes: As in `label_classes`, with `reduce_zero_label`.
        reduce_zero_label: See `classes`.
        kwargs: Other arguments of `SemSegEvaluator`, such as `output_dir`.

    Raises:
        DatasetError: If folders or classes cannot be used.
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
    load = functools.partial(_load, known)
    return LabelMapEvaluator(name, known, sem_seg_loading_fn=load, **kwargs)


def _load(classes: LabelClasses, path: str, dtype: Any = int) -> np.ndarray:
    return read_label_map(path, classes).astype(dtype)
