"""Branches of the published ViT models: network, pretrained weights and stochastic depth."""

from __future__ import annotations

import dataclasses
from typing import Literal

from ..config import BranchConfig, InteractionConfig
from .networks import DEIT3_384, INTERNVIT, MAE, VIT

__all__ = ["LIGHT_INTERACTION", "deit_branch", "fused_mlp", "internvit_6b", "mae_h", "with_own_grid"]

LIGHT_INTERACTION = InteractionConfig(projection=False, norm="none")
"""The interactions of the released "speedup" and segmentation models."""

# per size: pretrained weights (ViT-T is DeiT, the others DeiT III from ImageNet-21k) and stochastic depth
_DEIT = {
    "T": ("timm:deit_tiny_patch16_{}.fb_in1k", 0.05),
    "S": ("timm:deit3_small_patch16_{}.fb_in22k_ft_in1k", 0.05),
    "B": ("timm:deit3_base_patch16_{}.fb_in22k_ft_in1k", 0.15),
    "L": ("timm:deit3_large_patch16_{}.fb_in22k_ft_in1k", 0.4),
}

# ViT-H has 32 blocks for 12 interactions: two before each of the first four, three before the others
_H_SEGMENTS = (*((first, first + 1) for first in range(0, 8, 2)), *((first, first + 2) for first in range(8, 32, 3)))


def deit_branch(
    size: str,
    image_size: int,
    window_size: int | tuple[int | None, ...] | None,
    *,
    pretrained_at: Literal[224, 384] = 224,
) -> BranchConfig:
    """DeiT III; DeiT for size "T", which is there at 224 pixels only."""
    pretrained, drop_path_rate = _DEIT[size]
    return BranchConfig(
        network={224: VIT, 384: DEIT3_384}[pretrained_at][size],
        image_size=image_size,
        window_size=window_size,
        drop_path_rate=drop_path_rate,
        pretrained=pretrained.format(pretrained_at),
    )


def internvit_6b(image_size: int) -> BranchConfig:
    """InternViT-6B with global attention."""
    return BranchConfig(
        network=INTERNVIT["6B"],
        image_size=image_size,
        drop_path_rate=0.4,
        drop_path_schedule="linear",
        pretrained="weights/intern_vit_6b_224px.pth",
    )


def mae_h(image_size: int, *, segments: tuple[tuple[int, int], ...] | None = _H_SEGMENTS) -> BranchConfig:
    """ViT-H of MAE with global attention."""
    return BranchConfig(
        network=MAE["H"],
        image_size=image_size,
        segments=segments,
        drop_path_rate=0.4,
        drop_path_schedule="linear",
        pretrained="timm:vit_huge_patch14_224.mae",
    )


def fused_mlp(branch: BranchConfig) -> BranchConfig:
    """The branch with the MLP of the released "speedup" and segmentation models, which approximates GELU."""
    return dataclasses.replace(branch, network=dataclasses.replace(branch.network, activation="gelu_tanh"))


def with_own_grid(branch: BranchConfig) -> BranchConfig:
    """The branch with a position table for its image size, as segmentation models keep it; not that of pretraining."""
    network = branch.network
    grid = branch.image_size // network.patch_size
    return dataclasses.replace(branch, network=dataclasses.replace(network, pos_grid=grid))
