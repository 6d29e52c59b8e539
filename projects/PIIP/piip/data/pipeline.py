"""From an image to the network's input, outside of a model: what the test-time configuration amounts to."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from detectron2.data.transforms import AugInput, Augmentation, AugmentationList
from detectron2.structures import ImageList
from torch import Tensor

__all__ = ["network_input"]


def network_input(
    image: np.ndarray,
    augmentations: Sequence[Augmentation],
    *,
    mean: Sequence[float],
    std: Sequence[float],
    size_divisibility: int,
    image_format: str = "RGB",
) -> Tensor:
    """Resizes, normalises and pads one image as `dataloader.test.mapper` and `GeneralizedRCNN` do together.

    Args:
        image: (H, W, 3) uint8.
        augmentations: The mapper's, for example `[KeepRatioResize([(1568, 941)])]`.
        mean: Per channel, RGB.
        std: Per channel, RGB.
        size_divisibility: Sides are padded, at the bottom and right, to multiples of it with 0 (the mean colour).
        image_format: Channel order of the image, "RGB" or "BGR".

    Returns:
        (1, 3, H', W') float32, channels in RGB order.

    Raises:
        ValueError: If the image is not (H, W, 3) or the format unknown.
    """
    if image.ndim != 3 or image.shape[2] != 3:
        raise ValueError(f"image of shape {image.shape}: expected (H, W, 3)")
    if image_format not in ("RGB", "BGR"):
        raise ValueError(f"image_format={image_format!r}: expected 'RGB' or 'BGR'")
    inputs = AugInput(image[:, :, ::-1] if image_format == "BGR" else image)
    AugmentationList(augmentations)(inputs)
    resized = torch.as_tensor(np.ascontiguousarray(inputs.image.transpose(2, 0, 1)))
    normalised = (resized - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    return ImageList.from_tensors([normalised], size_divisibility).tensor
