"""Detectron2's dataset mapper with clear words, or a choice, for images that cannot be read."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import torch
from detectron2.data import DatasetMapper
from detectron2.data.detection_utils import SizeMismatchError, check_image_size
from detectron2.data.transforms import AugInput

from piip_core.images import UnreadableImageError

from .dataset import DatasetError, read_image
from .transforms import as_input


class CheckedDatasetMapper(DatasetMapper):
    """`DatasetMapper` that names the file when an image cannot be read or has another size than annotated.

    Args:
        is_train (bool): as in `DatasetMapper`.
        on_bad_image (str): "error" stops; "skip" (training only) returns None, which `build_train_loader` answers
            with another image, a count and a warning.
        kwargs: all other arguments of `DatasetMapper`.
    """

    def __init__(self, is_train: bool, *, on_bad_image: str = "error", **kwargs: Any) -> None:
        if on_bad_image not in ("error", "skip"):
            raise ValueError(f"on_bad_image={on_bad_image!r}: expected 'error' or 'skip'")
        if on_bad_image == "skip" and not is_train:
            raise ValueError("on_bad_image='skip' in evaluation would change the result: expected 'error'")
        super().__init__(is_train, **kwargs)
        self.on_bad_image = on_bad_image

    def __call__(self, dataset_dict: dict[str, Any]) -> dict[str, Any] | None:
        """Maps one record of a data set as `DatasetMapper` does.

        Returns:
            The sample, or None for an unreadable image with `on_bad_image="skip"`.

        Raises:
            UnreadableImageError: If the image file is missing, empty, truncated or not 8 bits per channel.
            DatasetError: If its size differs from the annotation, whatever `on_bad_image` says.
            ImageTooLargeError: If it has more pixels than Pillow's limit, whatever `on_bad_image` says.
        """
        path = dataset_dict["file_name"]
        try:
            return self.map_record(dataset_dict)
        except SizeMismatchError as error:
            raise DatasetError(
                f"{path}: {error} (image id {dataset_dict.get('image_id')}; width, height after EXIF rotation)"
            ) from error
        except UnreadableImageError as error:
            if self.on_bad_image == "skip":
                return None
            advice = "; the setting dataloader.train.mapper.on_bad_image=skip trains without such images"
            advice = advice if self.is_train else ""
            raise UnreadableImageError(f"{error}{advice}") from error

    def map_record(self, dataset_dict: dict[str, Any]) -> dict[str, Any]:
        """Makes a sample of a record, without the words for what may go wrong.

        As `DatasetMapper` does, but for its way of reading images, which turns TIFF files twice.
        """
        sample = copy.deepcopy(dataset_dict)
        image = read_image(sample["file_name"], self.image_format)
        check_image_size(sample, image)
        inputs = AugInput(image, sem_seg=self.read_labels(sample, image))
        transforms = self.augmentations(inputs)
        sample["image"] = as_input(inputs.image)
        if inputs.sem_seg is not None:
            sample["sem_seg"] = torch.as_tensor(inputs.sem_seg.astype(np.int64))
        if not self.is_train:
            sample.pop("annotations", None)
        elif "annotations" in sample:
            # DatasetMapper's place for users' changes ("USER: Modify this"). Seen with Detectron2 0.6 at 02b5c4e295e9
            self._transform_annotations(sample, transforms, inputs.image.shape[:2])
        return sample

    def read_labels(self, sample: dict[str, Any], image: np.ndarray) -> np.ndarray | None:
        """The label map (H, W) uint8 that belongs to an image (H, W, 3); detection has none."""
        return None
