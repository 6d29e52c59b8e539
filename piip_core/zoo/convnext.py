"""Mask R-CNN with ConvNeXt branches and with ConvNeXt and ViT branches side by side."""

from __future__ import annotations

from ..config import BranchConfig, InteractionConfig, MergingConfig, PIIPConfig
from .branches import deit_branch
from .entry import IMAGENET_MEAN, IMAGENET_STD, PublishedNumbers, ZooEntry
from .networks import CONVNEXT

__all__ = ["DEEP_SEGMENTS", "ENTRIES", "hybrid_pyramid"]

TABLE = "ConvNeXt-based models (Mask R-CNN, 1x)"

_NAMES = {"T": "tiny", "S": "small", "B": "base"}
_DROP_PATH = {"T": 0.3, "S": 0.3, "B": 0.4}
# Blocks before each of the 12 interactions: downsampling goes with the stage behind it
DEEP_SEGMENTS = ((0, 2), (3, 6), (7, 10), *((first, first + 2) for first in range(11, 35, 3)), (35, 38))
_SEGMENTS = {
    "T": ((0, 2), (3, 6), (7, 8), *((block, block) for block in range(9, 17)), (17, 20)),
    "S": DEEP_SEGMENTS,
    "B": DEEP_SEGMENTS,
}
_IMAGE_SIZES = {"T": 1024, "S": 672, "B": 448}


def _convnext_branch(size: str, image_size: int, *, drop_path_rate: float, segments: bool = True) -> BranchConfig:
    return BranchConfig(
        network=CONVNEXT[size],
        image_size=image_size,
        segments=_SEGMENTS[size] if segments else None,
        drop_path_rate=drop_path_rate,
        drop_path_schedule="linear",
        pretrained=f"timm:convnext_{_NAMES[size]}.fb_in1k",
    )


def hybrid_pyramid(kinds: str) -> PIIPConfig:
    """Published pyramid of T at 1024, S at 672 and B at 448 pixels with intermediate merging.

    Args:
        kinds: Per branch, T first, "C" for ConvNeXt or "V" for ViT, for example "CVV".
    """
    branches = [
        _convnext_branch(size, image_size, drop_path_rate=_DROP_PATH[size])
        if kind == "C"
        else deit_branch(size, image_size, 14)
        for kind, (size, image_size) in zip(kinds, _IMAGE_SIZES.items(), strict=True)
    ]
    return PIIPConfig(
        branches=tuple(reversed(branches)),
        # Where ConvNeXt ends a stage: one map for each of the strides 4, 8 and 16
        merging=MergingConfig(kind="regular", intermediate_after=(0, 1, 10)),
    )


def _hybrid_row(kinds: str, box_ap: float, mask_ap: float, flops_g: float) -> ZooEntry:
    parts = [f"{kind}{size}" for kind, size in zip(kinds, _IMAGE_SIZES, strict=True)]
    return ZooEntry(
        name="_".join(["piip", *(part.lower() for part in parts), *map(str, _IMAGE_SIZES.values())]),
        title=f"PIIP-{'-'.join(parts)}",
        table=TABLE,
        config=hybrid_pyramid(kinds),
        published=PublishedNumbers(box_ap=box_ap, mask_ap=mask_ap, flops_g=flops_g),
        pad_divisor=32,
        pixel_mean=IMAGENET_MEAN,
        pixel_std=IMAGENET_STD,
    )


def _baseline_row() -> ZooEntry:
    branch = _convnext_branch("B", 1024, drop_path_rate=0.0, segments=False)
    return ZooEntry(
        name="convnext_b_1024",
        title="ConvNeXt-B",
        table=TABLE,
        config=PIIPConfig(
            branches=(branch,),
            interaction=InteractionConfig(num_interactions=0),
            merging=MergingConfig(kind="single", out_blocks=branch.network.last_blocks()),
        ),
        published=PublishedNumbers(box_ap=42.4, mask_ap=38.7, flops_g=321),
        pad_divisor=64,
    )


ENTRIES = (
    _baseline_row(),
    _hybrid_row("CCC", 46.4, 41.7, 326),
    _hybrid_row("CVV", 47.1, 42.4, 373),
    _hybrid_row("CCV", 46.8, 42.2, 431),
    _hybrid_row("CVC", 46.7, 42.0, 297),
    _hybrid_row("VCV", 45.4, 40.9, 291),
    _hybrid_row("VCC", 45.2, 40.7, 231),
    _hybrid_row("VVC", 44.8, 40.3, 193),
)
