"""Networks of the published models, by size: T, S, B, L, H, 6B."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from ..branches import BEiTConfig, ConvNeXtConfig, UniPerceiverConfig, ViTConfig

__all__ = [
    "AUGREG_384",
    "BEIT",
    "CLIP",
    "CLIP_336",
    "CLIP_PATCH14_336",
    "CONVNEXT",
    "DEIT3_384",
    "DINOV2",
    "INTERNVIT",
    "MAE",
    "UNIPERCEIVER",
    "VIT",
]

VIT: Mapping[str, ViTConfig] = {
    "T": ViTConfig(embed_dim=192, depth=12, num_heads=3),
    "S": ViTConfig(embed_dim=384, depth=12, num_heads=6),
    "B": ViTConfig(embed_dim=768, depth=12, num_heads=12),
    "L": ViTConfig(embed_dim=1024, depth=24, num_heads=16),
    "H": ViTConfig(embed_dim=1280, depth=32, num_heads=16),
}
"""Plain ViT of each size. DeiT (v1) has no layer scale; the published models give it one that starts at 1."""


def _with_grid(sizes: str, pos_grid: int) -> dict[str, ViTConfig]:
    return {size: dataclasses.replace(VIT[size], pos_grid=pos_grid) for size in sizes}


DEIT3_384 = AUGREG_384 = _with_grid("SBL", 384 // 16)
# Position tables as the public loader leaves them: made for patches of 14 pixels, resized to patches of 16
DINOV2 = _with_grid("SBL", 518 // 16)
MAE = _with_grid("BLH", 224 // 16)

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
BEIT = {
    size: BEiTConfig(embed_dim=net.embed_dim, depth=net.depth, num_heads=net.num_heads, bias_window=28)
    for size, net in ((size, VIT[size]) for size in ("B", "L"))
}
UNIPERCEIVER = {
    size: UniPerceiverConfig(embed_dim=net.embed_dim, depth=net.depth, num_heads=net.num_heads)
    for size, net in ((size, VIT[size]) for size in ("B", "L"))
}
CONVNEXT: Mapping[str, ConvNeXtConfig] = {
    "T": ConvNeXtConfig(),
    "S": ConvNeXtConfig(depths=(3, 3, 27, 3)),
    "B": ConvNeXtConfig(depths=(3, 3, 27, 3), stage_dims=(128, 256, 512, 1024)),
    "L": ConvNeXtConfig(depths=(3, 3, 27, 3), stage_dims=(192, 384, 768, 1536)),
}

CLIP: Mapping[str, ViTConfig] = {
    size: dataclasses.replace(
        VIT[size],
        layer_scale=None,
        norm_eps=1e-5,
        activation="quick_gelu",
        pre_norm=True,
        class_token=True,
        class_position=True,
    )
    for size in ("B", "L")
}
"""Image encoder of OpenAI's CLIP for images of 224 pixels; L with its patches of 14 pixels resized to 16."""
# For images of 336 pixels, with patches of 16 and of 14 pixels
CLIP_336 = {"L": dataclasses.replace(CLIP["L"], pos_grid=336 // 16)}
CLIP_PATCH14_336 = {"L": dataclasses.replace(CLIP["L"], patch_size=14, pos_grid=336 // 14)}
