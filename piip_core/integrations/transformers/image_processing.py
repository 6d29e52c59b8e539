"""Images for PIIP models: transformers' own processor with the published settings."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import BitImageProcessorPil

from ...zoo.entry import IMAGENET_MEAN, IMAGENET_STD
from .configuration import PIIPTransformersConfig

__all__ = ["make_image_processor"]


def make_image_processor(
    config: PIIPTransformersConfig,
    *,
    mean: Sequence[float] = IMAGENET_MEAN,
    std: Sequence[float] = IMAGENET_STD,
) -> BitImageProcessorPil:
    """The processor with which classifiers are evaluated: short side to the input size (bicubic), centre crop.

    It resizes with Pillow, as timm's evaluation does. What it saves, `AutoImageProcessor` loads without this package;
    by default with torchvision, which differs by at most rounding; `backend="pil"` chooses Pillow.

    Args:
        config: Of the model.
        mean: Per channel, RGB, of values from 0 to 255.
        std: Likewise.
    """
    side = config.image_size
    return BitImageProcessorPil(
        size={"shortest_edge": side},
        crop_size={"height": side, "width": side},
        image_mean=[value / 255 for value in mean],
        image_std=[value / 255 for value in std],
    )
