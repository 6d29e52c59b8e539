"""From an image file and its class to a sample of the model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from PIL import Image

from ..images import read_image
from ..mapper import CheckedDatasetMapper

__all__ = ["ClassificationMapper"]


class ClassificationMapper(CheckedDatasetMapper):
    """Reads an image, EXIF rotation applied, and transforms it.

    Args:
        is_train (bool): whether images may be skipped.
        transform (Callable): from a PIL image to a uint8 tensor (3, H, W), as timm's
            `create_transform(..., use_prefetcher=True)` makes it: the model normalises.
        image_format (str): "RGB" or "BGR".
        kwargs: of `CheckedDatasetMapper`.
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
