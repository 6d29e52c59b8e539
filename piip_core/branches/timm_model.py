"""Any vision transformer or ConvNeXt of timm as a branch, by its name."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, ClassVar, NamedTuple, TypeAlias

import timm
import torch
import torch.nn.functional as F
from timm.layers import Attention, AttentionRope
from timm.models.convnext import ConvNeXt
from timm.models.eva import Eva, EvaAttention
from timm.models.naflexvit import NaFlexVit
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from ..errors import ConfigError, check
from ..meta import on_meta
from .base import Branch, BranchConfig, BranchState, NetworkConfig, register_branch, to_tuples
from .convnext import StagedBranch, steps_of
from .transformer import TransformerBranch, split_windows

Arguments: TypeAlias = Mapping[str, Tensor]
TimmTransformer: TypeAlias = VisionTransformer | Eva | NaFlexVit

_KINDS = (VisionTransformer, Eva, NaFlexVit, ConvNeXt)
_EXAMPLES = "vit_small_patch16_dinov3, eva02_base_patch14_224, vit_base_patch16_siglip_256, convnextv2_tiny"


@dataclass(frozen=True, kw_only=True)
class TimmConfig(NetworkConfig):
    """A network of timm: DINOv3, EVA-02, SigLIP 2, CLIP, DINOv2 with registers, ConvNeXt V2 and so on.

    Supported are models of timm's classes `VisionTransformer`, `Eva` (rotary positions), `NaFlexVit` and `ConvNeXt`.
    Images may have any size: position embeddings are resized, and rotary positions computed, as timm does. In windows,
    rotary positions are those of the whole map, every window has its own copy of class and register tokens, which are
    the mean of their copies after each block, and windows that the map does not fill are smaller.

    Args:
        name: Name in `timm.list_models()`, for example "vit_small_patch16_dinov3". Weights are named apart, in
            `BranchConfig.pretrained`.
        patch_size: Side of a patch in pixels; None for the model's own. Interactions and feature pyramids like 16;
            a pretrained patch kernel of another size is resized.
        keep_prefix_tokens: Keep class and register tokens. They take part in self-attention only.
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
        facts = _inspect(self)  # names are checked where they are given
        self.set_blocks(facts.dims, facts.strides, facts.no_windows)
        object.__setattr__(self, "class_token", facts.class_token)


class _Facts(NamedTuple):
    """What a network is like, found without memory."""

    dims: tuple[int, ...]
    strides: tuple[int, ...]
    no_windows: str
    class_token: bool


@lru_cache(maxsize=64)
def _inspect(config: TimmConfig) -> _Facts:
    """What follows from a configuration, once for each."""
    with on_meta():
        model = create_network(config)
    if isinstance(model, ConvNeXt):
        infos: list[Any] = [model.feature_info[stage] for stage, _ in steps_of(model)]
        reason, class_token = f"{config.name!r} is a ConvNeXt", False
    else:
        infos, reason = list(model.feature_info), ""
        attentions = {type(getattr(block, "attn", block)) for block in model.blocks}
        if others := attentions - set(_OVER_WINDOWS):
            reason = f"{config.name!r} computes attention in {others.pop().__name__}, which takes no windows"
        class_token = getattr(model, "embeds", model).cls_token is not None
    dims, strides = (tuple(info[key] for info in infos) for key in ("num_chs", "reduction"))
    return _Facts(dims, strides, reason, class_token)


def create_network(config: TimmConfig) -> TimmTransformer | ConvNeXt:
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
    if kind is ConvNeXt and patch_size is not None:
        raise ConfigError(f"TimmConfig.patch_size={patch_size}: expected None for {name!r}, a ConvNeXt")
    if kind is not ConvNeXt:
        options["global_pool"] = ""
        if kind is not NaFlexVit:  # which takes any size by itself
            options["dynamic_img_size"] = True
        if patch_size is not None:
            options["patch_size"] = patch_size
        if not config.keep_prefix_tokens:
            options |= {"class_token": False, "num_reg_tokens" if kind is Eva else "reg_tokens": 0}
    try:
        model = timm.create_model(name, pretrained=False, **options)
    except (TypeError, AssertionError, ValueError) as error:
        raise ConfigError(f"TimmConfig: timm cannot build {name!r} with {options}: {error}") from error
    assert isinstance(model, _KINDS)  # as `_kind` found
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
    if found not in _KINDS:
        hint = "; BEiTConfig describes BEiT" if found.__name__ == "Beit" else ""
        names = ", ".join(kind.__name__ for kind in _KINDS)
        raise ConfigError(
            f"TimmConfig.name={name!r}: timm's class is {found.__name__}; expected one of {names}, "
            f"for example {_EXAMPLES}{hint}"
        )
    return found


class _OverWindows:
    """Self-attention of timm whose sequences (..., N, C) have any number of dimensions before them."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        found = super().forward(x.flatten(0, -3), *args, **kwargs)  # type: ignore[misc]  # of the class after this one
        return found.unflatten(0, x.shape[:-2])


class _WindowAttention(_OverWindows, Attention): ...


class _WindowEvaAttention(_OverWindows, EvaAttention): ...


class _WindowAttentionRope(_OverWindows, AttentionRope): ...


_OVER_WINDOWS = {Attention: _WindowAttention, EvaAttention: _WindowEvaAttention, AttentionRope: _WindowAttentionRope}


class TimmTransformerBranch(TransformerBranch):
    """A `VisionTransformer`, `Eva` or `NaFlexVit` of timm, with its own positions and prefix tokens.

    Windows see the rotary positions of the whole map. Those that the map does not fill are smaller.
    """

    model: TimmTransformer

    def __init__(self, config: BranchConfig, model: TimmTransformer) -> None:
        padding = config.window_padding
        check(padding == "before_qkv", "BranchConfig.window_padding", padding, "'before_qkv' for networks of timm")
        super().__init__(config, model)
        for block, side in zip(model.blocks, config.window_sizes, strict=True):
            if side is not None:  # blocks then get (B, windows, N, C): stochastic depth stays one of images
                block.attn.__class__ = _OVER_WINDOWS[type(block.attn)]

    def embed(self, image: Tensor) -> BranchState:
        """Patches of an image (B, 3, H, W) with positions, and timm's prefix tokens and rotary positions."""
        sequence, grid, rotary = embed_image(self.model, self.crop(image))
        count = self.model.num_prefix_tokens
        prefix = sequence[:, :count] if count else None
        arguments = {side: self._arguments(rotary, grid, side, image) for side in set(self.config.window_sizes)}
        return BranchState(sequence[:, count:].unflatten(1, grid), prefix, arguments)

    def _arguments(self, rotary: Tensor | None, grid: tuple[int, int], side: int | None, image: Tensor) -> Arguments:
        """What blocks with windows of this side take besides tokens: rotary positions, and a mask of what pads."""
        arguments: dict[str, Tensor] = {}
        if rotary is not None:
            rotary = rotary if rotary.ndim == 4 else rotary[None, None]
            if side is not None:  # to (depth or 1, B * windows, heads or 1, N, D)
                windows = split_windows(rotary.unflatten(-2, grid), side).transpose(1, 2)
                rotary = windows.repeat(1, len(image), 1, 1, 1)
            arguments["rope"] = rotary
        if side is not None and any(length % side for length in grid):
            mask = split_windows(image.new_ones(1, *grid, 1, dtype=torch.bool), side)[0, :, None, None, :, 0]
            mask = F.pad(mask, (self.model.num_prefix_tokens, 0), value=True)
            arguments["attn_mask"] = mask.repeat(len(image), 1, 1, 1)
        return arguments


def embed_image(model: TimmTransformer, image: Tensor) -> tuple[Tensor, tuple[int, int], Tensor | None]:
    """A sequence (B, P + H * W, C) of prefix tokens and patches with positions, H and W, and rotary positions.

    Those are (H * W, D), or (depth, heads, H * W, D) where every block has its own.

    timm's own method for it is private but in NaFlexVit. Public ones run it together with all blocks, and give no
    rotary positions; writing it anew would copy every kind of position embedding. Seen working with timm 1.0.31.
    """
    network: Any = model
    rotary = None
    if isinstance(model, NaFlexVit):
        sequence, grid = network.embeds(image)
        rotary = None if network.rope is None else network.rope.get_embed(shape=grid)
    else:
        # The convolution leaves channels first in memory, and every sum after it would inherit that
        patches = network.patch_embed(image).contiguous()
        grid, sequence = patches.shape[1:3], network._pos_embed(patches)
        if isinstance(sequence, tuple):
            sequence, rotary = sequence
    return network.norm_pre(sequence), tuple(grid), rotary


@register_branch(TimmConfig)
def _build(config: BranchConfig[TimmConfig]) -> Branch:
    model = create_network(config.network)
    return StagedBranch(config, model) if isinstance(model, ConvNeXt) else TimmTransformerBranch(config, model)
