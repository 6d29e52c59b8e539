"""Backbones of the published detectors and segmentors."""

from __future__ import annotations

import dataclasses
from typing import Any

from ..config import BranchConfig, InteractionConfig, MergingConfig, PIIPConfig
from ..errors import ConfigError
from .networks import (
    CONVNEXT,
    DEEP_SEGMENTS,
    LIGHT_INTERACTION,
    TIMM_SIZES,
    VIT,
    deit_branch,
    fused_mlp,
    internvit_6b,
    mae_h,
)


def deit_pyramid(sizes: str, image_sizes: tuple[int, ...], window_size: int | None) -> PIIPConfig:
    """Published PIIP of DeiT branches, all windowed, with 12 interactions.

    Args:
        sizes: Model sizes as in the published names, smallest first, for example "TSB". The last is Branch 1.
        image_sizes: Image side of each, largest first.
        window_size: Side of the attention windows in tokens.
    """
    pairs = list(zip(sizes, image_sizes, strict=True))
    return PIIPConfig(branches=tuple(deit_branch(size, side, window_size) for size, side in reversed(pairs)))


def baseline(size: str, image_size: int) -> PIIPConfig:
    """Published single-branch ViT: two windowed blocks, then a global one, and so on."""
    return single_branch(deit_branch(size, image_size, (14, 14, None) * (VIT[size].depth // 3)))


def tsbl_as_released(config: PIIPConfig) -> PIIPConfig:
    """The network that the public four-branch code builds: Branch 4 is a second copy of Branch 3's model.

    The public class reads only image size and segments from the settings of Branch 4. The published parameter and
    FLOP counts are of the configured ViT-T; a checkpoint trained with the public code has 384-wide
    `branch4.patch_embed.proj.weight` and needs this configuration.

    Raises:
        ConfigError: If `config` has not four branches.
    """
    if len(config.branches) != 4:
        raise ConfigError(f"config has {len(config.branches)} branches: expected 4, as in the piip_tsbl_* models")
    *rest, third, fourth = config.branches
    fourth = dataclasses.replace(third, image_size=fourth.image_size, segments=fourth.segments)
    return dataclasses.replace(config, branches=(*rest, third, fourth))


def single_branch(branch: BranchConfig, **merging: Any) -> PIIPConfig:
    """A branch alone, without interactions; `merging` as for `MergingConfig`."""
    return PIIPConfig(
        branches=(branch,),
        interaction=InteractionConfig(num_interactions=0),
        merging=MergingConfig(kind="single", **(merging or {"pyramid_norm": "layer"})),
    )


def windowed(config: PIIPConfig) -> PIIPConfig:
    """Windows of 14 in all branches, as the paper has them for InternViT-6B."""
    branches = (dataclasses.replace(branch, window_size=14) for branch in config.branches)
    return dataclasses.replace(config, branches=tuple(branches))


def lh6b(large: int, huge: int, image_size: int) -> PIIPConfig:
    """The paper's three-branch models (Table IV); the last size is that of InternViT-6B."""
    branches = (internvit_6b(image_size), mae_h(huge), deit_branch("L", large, None, pretrained_at=384))
    return windowed(PIIPConfig(branches=branches))


def lh6b_speedup() -> PIIPConfig:
    """The released three-branch models with InternViT-6B: four interactions, global attention."""
    branches = (internvit_6b(512), mae_h(1024, segments=None), deit_branch("L", 1536, None, pretrained_at=384))
    return PIIPConfig(
        branches=tuple(map(fused_mlp, branches)),
        interaction=dataclasses.replace(LIGHT_INTERACTION, num_interactions=4),
    )


def h6b(image_size: int, largest: int) -> PIIPConfig:
    """The released two-branch models, `image_size` that of InternViT-6B: global attention, 12 interactions."""
    return PIIPConfig(branches=(internvit_6b(image_size), mae_h(largest)))


def h6b_speedup(image_size: int, largest: int) -> PIIPConfig:
    """The same with lighter interactions, and MLPs that approximate GELU."""
    branches = h6b(image_size, largest).branches
    return PIIPConfig(branches=tuple(map(fused_mlp, branches)), interaction=LIGHT_INTERACTION)


# Blocks before each of the 12 interactions: downsampling goes with the stage after it
CONVNEXT_SEGMENTS = {
    "T": ((0, 2), (3, 6), (7, 8), *((block, block) for block in range(9, 17)), (17, 20)),
    "S": DEEP_SEGMENTS,
    "B": DEEP_SEGMENTS,
    "L": DEEP_SEGMENTS,
}


STAGED_MERGING = MergingConfig(kind="regular", intermediate_after=(0, 1, 10))
"""Where ConvNeXt ends a stage: one map for each of the strides 4, 8 and 16."""


def convnext_branch(size: str, image_size: int, weights: str | None = None, **options: Any) -> BranchConfig:
    """ConvNeXt, from ImageNet-1K without other `weights`; `options` as for `BranchConfig`."""
    return BranchConfig(
        network=CONVNEXT[size],
        image_size=image_size,
        drop_path_schedule="linear",
        pretrained=weights or f"timm:convnext_{TIMM_SIZES[size]}.fb_in1k",
        **options,
    )


def hybrid_pyramid(kinds: str) -> PIIPConfig:
    """Published pyramid of T at 1024, S at 672 and B at 448 pixels with intermediate merging.

    Args:
        kinds: Per branch, T first, "C" for ConvNeXt or "V" for ViT, for example "CVV".
    """
    branches: list[BranchConfig] = []
    for kind, size, image_size in zip(kinds, "TSB", (1024, 672, 448), strict=True):
        if kind == "V":
            branch = deit_branch(size, image_size, 14)
        else:
            rate = 0.4 if size == "B" else 0.3
            branch = convnext_branch(size, image_size, drop_path_rate=rate, segments=CONVNEXT_SEGMENTS[size])
        branches.insert(0, branch)
    return PIIPConfig(branches=tuple(branches), merging=STAGED_MERGING)
