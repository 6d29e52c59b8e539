"""Networks of the published models by size (T, S, B, L, H, 6B), and branches that hold them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

from ..branches import BEiTConfig, ConvNeXtConfig, UniPerceiverConfig, ViTConfig
from ..config import BranchConfig, InteractionConfig

TIMM_SIZES = {"T": "tiny", "S": "small", "B": "base", "L": "large"}
"""What timm calls the sizes."""

VIT: Mapping[str, ViTConfig] = {
    "T": ViTConfig(embed_dim=192, depth=12, num_heads=3),
    "S": ViTConfig(embed_dim=384, depth=12, num_heads=6),
    "B": ViTConfig(embed_dim=768, depth=12, num_heads=12),
    "L": ViTConfig(embed_dim=1024, depth=24, num_heads=16),
    "H": ViTConfig(embed_dim=1280, depth=32, num_heads=16),
}
"""Plain ViT of each size. DeiT (v1) has no layer scale; the published models give it one that starts at 1."""


def _vits(sizes: str, **changes: Any) -> dict[str, ViTConfig]:
    return {size: dataclasses.replace(VIT[size], **changes) for size in sizes}


def _of_vit_sizes(network: type, **options: Any) -> dict[str, Any]:
    sizes = ("embed_dim", "depth", "num_heads")
    return {size: network(**{name: getattr(VIT[size], name) for name in sizes}, **options) for size in "BL"}


DEIT3_384 = AUGREG_384 = _vits("SBL", pos_grid=384 // 16)
# Position tables as the public loader leaves them: made for patches of 14 pixels, resized to patches of 16
DINOV2 = _vits("SBL", pos_grid=518 // 16)
MAE = _vits("BLH", pos_grid=224 // 16)
BEIT: Mapping[str, BEiTConfig] = _of_vit_sizes(BEiTConfig, bias_window=28)
UNIPERCEIVER: Mapping[str, UniPerceiverConfig] = _of_vit_sizes(UniPerceiverConfig)
INTERNVIT = {
    "6B": ViTConfig(
        embed_dim=3200,
        depth=48,
        num_heads=25,
        qkv_bias=False,
        layer_scale=0.1,
        norm="rmsnorm",
        qk_norm=True,
    )
}
CONVNEXT: Mapping[str, ConvNeXtConfig] = {
    "T": ConvNeXtConfig(),
    "S": ConvNeXtConfig(depths=(3, 3, 27, 3)),
    "B": ConvNeXtConfig(depths=(3, 3, 27, 3), stage_dims=(128, 256, 512, 1024)),
    "L": ConvNeXtConfig(depths=(3, 3, 27, 3), stage_dims=(192, 384, 768, 1536)),
}
CLIP = _vits(
    "BL",
    layer_scale=None,
    norm_eps=1e-5,
    activation="quick_gelu",
    pre_norm=True,
    class_token=True,
    class_position=True,
)
"""Image encoder of OpenAI's CLIP for images of 224 pixels; L with its patches of 14 pixels resized to 16."""
# For images of 336 pixels, with patches of 16 and of 14 pixels
CLIP_336 = {"L": dataclasses.replace(CLIP["L"], pos_grid=336 // 16)}
CLIP_PATCH14_336 = {"L": dataclasses.replace(CLIP["L"], patch_size=14, pos_grid=336 // 14)}

LIGHT_INTERACTION = InteractionConfig(projection=False, norm="none")
"""The interactions of the released "speedup" and segmentation models."""

DEEP_SEGMENTS = ((0, 2), (3, 6), (7, 10), *((first, first + 2) for first in range(11, 35, 3)), (35, 38))
"""Blocks of ConvNeXt-S, B and L before each of 12 interactions: downsampling goes with the stage after it."""

# ViT-H has 32 blocks for 12 interactions: two before each of the first four, three before the others
_H_SEGMENTS = (*((first, first + 1) for first in range(0, 8, 2)), *((first, first + 2) for first in range(8, 32, 3)))
# Stochastic depth of DeiT by size
_DROP_PATH = {"T": 0.05, "S": 0.05, "B": 0.15, "L": 0.4}


def deit_branch(
    size: str,
    image_size: int,
    window_size: int | tuple[int | None, ...] | None,
    *,
    pretrained_at: Literal[224, 384] = 224,
) -> BranchConfig:
    """DeiT III from ImageNet-21k; DeiT for size "T", which is there at 224 pixels only."""
    weights = "deit_{}_patch16_{}.fb_in1k" if size == "T" else "deit3_{}_patch16_{}.fb_in22k_ft_in1k"
    return BranchConfig(
        network={224: VIT, 384: DEIT3_384}[pretrained_at][size],
        image_size=image_size,
        window_size=window_size,
        drop_path_rate=_DROP_PATH[size],
        pretrained=f"timm:{weights.format(TIMM_SIZES[size], pretrained_at)}",
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


def with_network(branch: BranchConfig, **changes: Any) -> BranchConfig:
    """The branch with other fields of its network."""
    return dataclasses.replace(branch, network=dataclasses.replace(branch.network, **changes))


def fused_mlp(branch: BranchConfig) -> BranchConfig:
    """The branch with the MLP of the released "speedup" and segmentation models, which approximates GELU."""
    return with_network(branch, activation="gelu_tanh")


def with_own_grid(branch: BranchConfig) -> BranchConfig:
    """The branch with a position table for its image size, as segmentation models keep it; not that of pretraining."""
    return with_network(branch, pos_grid=branch.image_size // branch.network.patch_size)
