"""Networks of timm by name, without what branches have no use for."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any

import timm
from timm.models.convnext import ConvNeXt
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from ..errors import ConfigError
from ..meta import on_meta
from .window import MapAttention

__all__ = ["create_model", "describe"]

_EXAMPLES = "vit_small_patch16_dinov3, eva02_base_patch14_224, vit_base_patch16_siglip_256, convnextv2_tiny"


def create_model(
    name: str, *, patch_size: int | None, keep_prefix_tokens: bool, options: Mapping[str, Any]
) -> nn.Module:
    """timm's network without final norm, pooling and head, for images of any size; see `TimmConfig`.

    Raises:
        ConfigError: If timm has no such model, one of another class, or one that does not take the options.
    """
    if not timm.is_model(name):
        close = difflib.get_close_matches(name, timm.list_models(), n=3, cutoff=0.5)
        known = f"close matches are {', '.join(close)}" if close else f"names are such as {_EXAMPLES}"
        raise ConfigError(f"TimmConfig.name={name!r}: timm has no such model; {known}")
    kind = _kind(name)
    options = {"num_classes": 0, **options}
    if kind is not ConvNeXt:
        options |= {"global_pool": "", "dynamic_img_size": True}
        if patch_size is not None:
            options["patch_size"] = patch_size
        if not keep_prefix_tokens:
            options |= {"class_token": False, "reg_tokens" if kind is VisionTransformer else "num_reg_tokens": 0}
            if kind is VisionTransformer:
                options["attn_layer"] = MapAttention
    elif patch_size is not None:
        raise ConfigError(f"TimmConfig.patch_size={patch_size}: expected None for {name!r}, a ConvNeXt")
    try:
        model = timm.create_model(name, pretrained=False, **options)
    except (TypeError, AssertionError, ValueError) as error:
        raise ConfigError(f"TimmConfig: timm cannot build {name!r} with {options}: {error}") from error
    for part in ("norm", "fc_norm", "head"):
        if hasattr(model, part):
            setattr(model, part, nn.Identity())
    if kind is ConvNeXt:
        model.norm_pre = nn.Identity()
    return model


def _kind(name: str) -> type[nn.Module]:
    """timm's class of a model, from a build without memory."""
    with on_meta():
        found = type(timm.create_model(name, pretrained=False, num_classes=0))
    if found not in (VisionTransformer, Eva, ConvNeXt):
        hint = "; BEiTConfig describes BEiT" if found.__name__ == "Beit" else ""
        raise ConfigError(
            f"TimmConfig.name={name!r}: timm's class is {found.__name__}; expected VisionTransformer, Eva or "
            f"ConvNeXt, for example {_EXAMPLES}{hint}"
        )
    return found


def describe(model: nn.Module, name: str) -> tuple[tuple[int, ...], tuple[int, ...], str]:
    """Channels and strides after each block, and why there are no windows ("" if there are)."""
    if isinstance(model, ConvNeXt):
        steps = [
            (info["num_chs"], info["reduction"])
            for stage, info in zip(model.stages, model.feature_info, strict=True)
            for _ in range(len(stage.blocks) + (not isinstance(stage.downsample, nn.Identity)))
        ]
        dims, strides = zip(*steps, strict=True)
        return dims, strides, f"{name!r} is a ConvNeXt"
    depth, patch = len(model.blocks), model.patch_embed.patch_size[0]
    if isinstance(model, Eva):
        reason = f"{name!r} has rotary positions, for global attention alone"
    elif not isinstance(model.blocks[0].attn, MapAttention):
        reason = "windows need keep_prefix_tokens=False: class and register tokens belong to no window"
    else:
        reason = ""
    return (model.embed_dim,) * depth, (patch,) * depth, reason
