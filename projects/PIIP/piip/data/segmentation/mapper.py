"""From a record of images and label maps to a sample of the model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from ..dataset import DatasetError
from ..mapper import CheckedDatasetMapper
from .classes import label_classes
from .label_maps import read_label_map

__all__ = ["SemSegDatasetMapper"]


class SemSegDatasetMapper(CheckedDatasetMapper):
    """Reads an image and, for training, its label map, and augments both together.

    Args:
        is_train (bool): whether samples hold labels. For tests the evaluator reads them itself.
        classes (str | int | Sequence[str]): as in `label_classes`.
        reduce_zero_label (bool): as in `label_classes`.
        image_format (str): "RGB" or "BGR".
        kwargs: of `CheckedDatasetMapper`; `on_bad_image` holds for label maps that cannot be read, too, and
            `augmentations` of images only leave labels as they are.
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
