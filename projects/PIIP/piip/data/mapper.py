"""Detectron2's dataset mapper with clear words, or a choice, for images that cannot be read."""

from __future__ import annotations

from typing import Any

from detectron2.data import DatasetMapper
from detectron2.data.detection_utils import SizeMismatchError

from .errors import DatasetError
from .images import UnreadableImageError, check_image_mode, read_image

__all__ = ["CheckedDatasetMapper"]


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
        """
        path = dataset_dict["file_name"]
        try:
            check_image_mode(path)
            return self.map_record(dataset_dict)
        except SizeMismatchError as error:
            raise DatasetError(
                f"{path}: {error} (image id {dataset_dict.get('image_id')}; width, height after EXIF rotation)"
            ) from error
        except UnreadableImageError as error:
            if self.on_bad_image == "skip":
                return None
            raise self._with_advice(error) from error
        except Exception:
            # Was it the file, or a bug in a transform? Decoding once more tells.
            try:
                read_image(path, self.image_format)
            except UnreadableImageError as error:
                if self.on_bad_image == "skip":
                    return None
                raise self._with_advice(error) from error
            raise

    def map_record(self, dataset_dict: dict[str, Any]) -> dict[str, Any]:
        """Makes a sample of a record, without the words for what may go wrong."""
        return super().__call__(dataset_dict)

    def _with_advice(self, error: UnreadableImageError) -> UnreadableImageError:
        advice = "; dataloader.train.mapper.on_bad_image=skip trains without such images" if self.is_train else ""
        return UnreadableImageError(f"{error}{advice}")
