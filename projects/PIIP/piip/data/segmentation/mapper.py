"""From a record of images and label maps to a sample of the model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from detectron2.data.detection_utils import check_image_size
from detectron2.data.transforms import AugInput

from ..dataset import DatasetError
from ..images import read_image
from ..mapper import CheckedDatasetMapper
from ..transforms import as_input
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

    def map_record(self, dataset_dict: dict[str, Any]) -> dict[str, Any]:
        """Makes a sample: "image" (3, H, W) uint8 and in training "sem_seg" (H, W) int64 with 255 to ignore."""
        sample = dict(dataset_dict)
        labels_path = sample.pop("sem_seg_file_name", None)
        image = read_image(sample["file_name"], self.image_format)
        check_image_size(sample, image)
        labels = read_label_map(labels_path, self.classes) if self.is_train else None
        if labels is not None and labels.shape != image.shape[:2]:
            raise DatasetError(
                f"{labels_path}: {labels.shape} (h, w), its image {image.shape[:2]} after EXIF rotation: expected one "
                "size"
            )
        inputs = AugInput(image, sem_seg=labels)
        self.augmentations(inputs)
        sample["image"] = as_input(inputs.image)
        if self.is_train:
            sample["sem_seg"] = torch.as_tensor(inputs.sem_seg.astype(np.int64))
        return sample
