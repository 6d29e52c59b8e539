"""Any vision transformer or ConvNeXt of timm as a branch, by its name."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, ClassVar

import timm
from timm.models.convnext import ConvNeXt
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from ..errors import ConfigError, check
from ..meta import on_meta
from .base import Branch, BranchConfig, BranchState, NetworkConfig, register_branch, to_tuples
from .convnext import StagedBranch, steps_of
from .transformer import MapAttention, TransformerBranch

_EXAMPLES = "vit_small_patch16_dinov3, eva02_base_patch14_224, vit_base_patch16_siglip_256, convnextv2_tiny"


@dataclass(frozen=True, kw_only=True)
class TimmConfig(NetworkConfig):
    """A network of timm: DINOv3, EVA-02, SigLIP 2, CLIP, DINOv2 with registers, ConvNeXt V2 and so on.

    Supported are models of timm's classes `VisionTransformer`, `Eva` (with rotary positions) and `ConvNeXt`. Images may
    have any size: position embeddings are resized, and rotary positions computed, as timm does.

    Args:
        name: Name in `timm.list_models()`, for example "vit_small_patch16_dinov3". Weights are named apart, in
            `BranchConfig.pretrained`.
        patch_size: Side of a patch in pixels; None for the model's own. Interactions and feature pyramids like 16;
            a pretrained patch kernel of another size is resized.
        keep_prefix_tokens: Keep class and register tokens. They take part in self-attention only; window attention
            needs a network without.
        options: Other arguments of `timm.create_model`, as a mapping or pairs.

    Raises:
        ConfigError: If timm has no such model, or one of another class.
    """

    family: ClassVar[str] = "timm"

    name: str
    patch_size: int | None = None
    keep_prefix_tokens: bool = True
    options: tuple[tuple[str, Any], ...] = ()

    def __post_init__(self) -> None:
        check(isinstance(self.name, str), "TimmConfig.name", self.name, "the name of a model of timm")
        pairs = self.options.items() if isinstance(self.options, Mapping) else self.options
        object.__setattr__(self, "options", tuple(sorted((str(key), to_tuples(value)) for key, value in pairs)))
        self.set_blocks(*_inspect(self))  # names are checked where they are given


@lru_cache(maxsize=64)
def _inspect(config: TimmConfig) -> tuple[tuple[int, ...], tuple[int, ...], str]:
    """Dims, strides and why there can be no windows, from a network without memory, once per configuration."""
    with on_meta():
        model = create_network(config)
    if isinstance(model, ConvNeXt):
        infos: list[Any] = [model.feature_info[stage] for stage, _ in steps_of(model)]
        dims, strides = (tuple(info[key] for info in infos) for key in ("num_chs", "reduction"))
        return dims, strides, f"{config.name!r} is a ConvNeXt"
    depth, patch = len(model.blocks), model.patch_embed.patch_size[0]
    if isinstance(model, Eva):
        reason = f"{config.name!r} has rotary positions, for global attention alone"
    elif not isinstance(model.blocks[0].attn, MapAttention):
        reason = "windows need keep_prefix_tokens=False: class and register tokens belong to no window"
    else:
        reason = ""
    return (model.embed_dim,) * depth, (patch,) * depth, reason


def create_network(config: TimmConfig) -> VisionTransformer | Eva | ConvNeXt:
    """timm's network without final norm, pooling and head, for images of any size.

    Raises:
        ConfigError: If timm has no such model, one of another class, or one that does not take the options.
    """
    name, patch_size = config.name, config.patch_size
    if not timm.is_model(name):
        close = difflib.get_close_matches(name, timm.list_models(), n=3, cutoff=0.5)
        known = f"close matches are {', '.join(close)}" if close else f"names are such as {_EXAMPLES}"
        raise ConfigError(f"TimmConfig.name={name!r}: timm has no such model; {known}")
    kind = _kind(name)
    options: dict[str, Any] = {"num_classes": 0, **dict(config.options)}
    if kind is not ConvNeXt:
        options |= {"global_pool": "", "dynamic_img_size": True}
        if patch_size is not None:
            options["patch_size"] = patch_size
        if not config.keep_prefix_tokens:
            options |= {"class_token": False, "reg_tokens" if kind is VisionTransformer else "num_reg_tokens": 0}
            if kind is VisionTransformer:
                options["attn_layer"] = MapAttention
    elif patch_size is not None:
        raise ConfigError(f"TimmConfig.patch_size={patch_size}: expected None for {name!r}, a ConvNeXt")
    try:
        model = timm.create_model(name, pretrained=False, **options)
    except (TypeError, AssertionError, ValueError) as error:
        raise ConfigError(f"TimmConfig: timm cannot build {name!r} with {options}: {error}") from error
    assert isinstance(model, (VisionTransformer, Eva, ConvNeXt))  # as `_kind` found
    for part in ("norm", "fc_norm", "head"):
        if hasattr(model, part):
            setattr(model, part, nn.Identity())
    if isinstance(model, ConvNeXt):
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


class TimmTransformerBranch(TransformerBranch):
    """A `VisionTransformer` or `Eva` of timm, with its own position embeddings and prefix tokens."""

    model: VisionTransformer | Eva

    def embed(self, image: Tensor) -> BranchState:
        """Patches of an image (B, 3, H, W) with positions, and timm's prefix tokens and rotary positions."""
        patches = self.patch_map(image)
        grid = patches.shape[1:3]
        sequence, rotary = embed_positions(self.model, patches)
        sequence = self.model.norm_pre(sequence)
        count = self.model.num_prefix_tokens
        prefix = sequence[:, :count] if count else None
        return BranchState(sequence[:, count:].unflatten(1, grid), prefix, rotary)


def embed_positions(model: VisionTransformer | Eva, patches: Tensor) -> tuple[Tensor, Tensor | None]:
    """A sequence (B, P + H * W, C) of prefix tokens and patches (B, H, W, C) with positions, and rotary positions.

    timm's own method for it is private. Public ones run it together with all blocks, and give no rotary positions;
    writing it anew would copy every kind of position embedding. Seen working with timm 1.0.31.
    """
    sequence = model._pos_embed(patches)
    return sequence if isinstance(sequence, tuple) else (sequence, None)


@register_branch(TimmConfig)
def _build(config: BranchConfig[TimmConfig]) -> Branch:
    model = create_network(config.network)
    return StagedBranch(config, model) if isinstance(model, ConvNeXt) else TimmTransformerBranch(config, model)
