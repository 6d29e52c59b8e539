"""Any vision transformer or ConvNeXt of timm as a branch, by its name."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
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
from .transformer import TransformerBranch, ceil_div, join_windows, split_windows

TimmTransformer: TypeAlias = VisionTransformer | Eva | NaFlexVit

_KINDS = (VisionTransformer, Eva, NaFlexVit, ConvNeXt)
_EXAMPLES = "vit_small_patch16_dinov3, eva02_base_patch14_224, vit_base_patch16_siglip_256, convnextv2_tiny"


@dataclass(frozen=True, kw_only=True)
class TimmConfig(NetworkConfig):
    """A network of timm: DINOv3, EVA-02, SigLIP 2, CLIP, DINOv2 with registers, ConvNeXt V2 and so on.

    Supported are models of timm's classes `VisionTransformer`, `Eva` (rotary positions), `NaFlexVit` and `ConvNeXt`.
    Images may have any size: position embeddings are resized, and rotary positions computed, as timm does.

    Class and register tokens take part in self-attention only. In windows rotary positions are those of the whole map;
    every window attends to its own copy of class and register tokens, and these get the mean of what their copies see.
    A map is cut into as few windows of at most the given side as it needs, all of the same size; what the last ones
    lack is masked.

    Args:
        name: Name in `timm.list_models()`, for example "vit_small_patch16_dinov3". Weights are named apart, in
            `BranchConfig.pretrained`.
        patch_size: Side of a patch in pixels; None for the model's own. Interactions and feature pyramids like 16;
            a pretrained patch kernel of another size is resized.
        options: Other arguments of `timm.create_model`, as a mapping or pairs. `class_token=False` goes without one.

    Raises:
        ConfigError: If timm has no such model, or one of another class.
    """

    family: ClassVar[str] = "timm"

    name: str
    patch_size: int | None = None
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
        if others := attentions - set(_IN_WINDOWS):
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
            f"such as {_EXAMPLES}{hint}. Any other needs an adapter that offers embed, run_block, layer_of, "
            "and dims and strides of its blocks: CONTRIBUTING.md has one of twenty lines"
        )
    return found


class Windows(NamedTuple):
    """Windows of a sequence of prefix tokens and a map, which attention gets in the place of a mask.

    Every window has its own copy of the prefix tokens, whose results are averaged. What the map lacks at the bottom and
    right is masked.

    Attributes:
        size: Height and width of a window in tokens.
        grid: Height and width of the map.
        prefix: Number of prefix tokens.
        mask: (B * windows, 1, 1, N), False for what the map lacks; None if there is nothing.
    """

    size: tuple[int, int]
    grid: tuple[int, int]
    prefix: int
    mask: Tensor | None

    @classmethod
    def of(cls, size: tuple[int, int], grid: tuple[int, int], prefix: int, image: Tensor) -> Windows:
        """Windows of maps for a batch of images."""
        mask = None
        if any(length % side for length, side in zip(grid, size, strict=True)):
            mask = split_windows(image.new_ones(*grid, 1, dtype=torch.bool), size)[:, None, None, :, 0]
            mask = F.pad(mask, (prefix, 0), value=True).repeat(image.shape[0], 1, 1, 1)
        return cls(size, grid, prefix, mask)

    def attend(self, x: Tensor, attend: Callable[..., Tensor], **options: Any) -> Tensor:
        """Self-attention (B, P + H * W, C) in the windows; `attend` takes (B * windows, N, C)."""
        prefix, tokens = x[:, : self.prefix], x[:, self.prefix :]
        windows = split_windows(tokens.unflatten(1, self.grid), self.size)
        copies = prefix[:, None].expand(-1, windows.shape[1], -1, -1)
        sequences = torch.cat((copies, windows), dim=2)
        found = attend(sequences.flatten(0, 1), attn_mask=self.mask, **options).unflatten(0, windows.shape[:2])
        tokens = join_windows(found[:, :, self.prefix :], self.size, self.grid).flatten(1, 2)
        return torch.cat((found[:, :, : self.prefix].mean(dim=1), tokens), dim=1)


class _InWindows:
    """Self-attention of timm that takes `Windows` in the place of a mask, which timm's blocks hand on to it."""

    def forward(self, x: Tensor, *args: Any, **options: Any) -> Tensor:
        windows: Windows = options.pop("attn_mask")
        return windows.attend(x, super().forward, **options)  # type: ignore[misc]  # of the class after this one


class _WindowAttention(_InWindows, Attention): ...


class _WindowEvaAttention(_InWindows, EvaAttention): ...


class _WindowAttentionRope(_InWindows, AttentionRope): ...


_IN_WINDOWS = {Attention: _WindowAttention, EvaAttention: _WindowEvaAttention, AttentionRope: _WindowAttentionRope}


class TimmTransformerBranch(TransformerBranch):
    """A `VisionTransformer`, `Eva` or `NaFlexVit` of timm, with its own positions and prefix tokens."""

    model: TimmTransformer

    def __init__(self, config: BranchConfig, model: TimmTransformer) -> None:
        padding = config.window_padding
        check(padding == "before_qkv", "BranchConfig.window_padding", padding, "'before_qkv' for networks of timm")
        super().__init__(config, model)
        for block, side in zip(model.blocks, config.window_sizes, strict=True):
            if side is not None:
                block.attn.__class__ = _IN_WINDOWS[type(block.attn)]

    def embed(self, image: Tensor) -> BranchState:
        """Patches of an image (B, 3, H, W) with positions, timm's prefix tokens, and arguments of blocks by window."""
        sequence, grid, rotary = embed_image(self.model, self.crop(image))
        count = self.model.num_prefix_tokens
        arguments: dict[int | None, dict[str, Any]] = {}
        for block, side in enumerate(self.config.window_sizes):
            if side not in arguments:
                size = self.window(block, grid)
                arguments[side] = {} if size is None else {"attn_mask": Windows.of(size, grid, count, image)}
                if rotary is not None:
                    arguments[side]["rope"] = _rotary_of(rotary, grid, size, image.shape[0])
        prefix = sequence[:, :count] if count else None
        return BranchState(sequence[:, count:].unflatten(1, grid), prefix, arguments)

    def window(self, block: int, grid: tuple[int, int]) -> tuple[int, int] | None:
        """As few windows as their side allows, and all of the same size: the least that is beyond the map."""
        side = self.config.window_sizes[block]
        if side is None:
            return None
        height, width = (ceil_div(length, ceil_div(length, side)) for length in grid)
        return height, width

    def block_arguments(self, state: BranchState, index: int) -> dict[str, Any]:
        """Windows, and the rotary positions of the whole map, or those of this block where each has its own."""
        arguments = dict(state.positions[self.config.window_sizes[index]])
        if "rope" in arguments:
            arguments["rope"] = arguments["rope"][index % len(arguments["rope"])]
        return arguments


def _rotary_of(rotary: Tensor, grid: tuple[int, int], size: tuple[int, int] | None, images: int) -> Tensor:
    """Rotary positions (depth or 1, heads or 1, H * W, D), in windows (depth or 1, B * windows, heads or 1, N, D)."""
    rotary = rotary if rotary.ndim == 4 else rotary[None, None]
    if size is None:
        return rotary
    return split_windows(rotary.unflatten(-2, grid), size).transpose(1, 2).repeat(1, images, 1, 1, 1)


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
