"""Architectures of single networks that can be branches, one dataclass per family."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from .validation import check, check_choice, freeze_sequences

__all__ = ["BEiTConfig", "ConvNeXtConfig", "NetworkConfig", "UniPerceiverConfig", "ViTConfig"]


class NetworkConfig:
    """Base of the per-family architecture descriptions; `family` is the tag used in dictionaries.

    Attributes:
        depth: Number of blocks, as segments count them.
        dims: Channels after each block.
        strides: Pixels of the branch's image per feature cell after each block.
        no_windows: Why attention cannot work in windows; empty if it can.
    """

    family: ClassVar[str]
    no_windows: str = ""
    families: ClassVar[dict[str, type[NetworkConfig]]] = {}

    depth: int
    dims: tuple[int, ...]
    strides: tuple[int, ...]

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "family" in cls.__dict__:
            NetworkConfig.families[cls.family] = cls


class _PlainTransformer(NetworkConfig):
    """What all plain vision transformers share: one width and one stride."""

    embed_dim: int
    num_heads: int
    patch_size: int

    @property
    def dims(self) -> tuple[int, ...]:
        return (self.embed_dim,) * self.depth

    @property
    def strides(self) -> tuple[int, ...]:
        return (self.patch_size,) * self.depth

    def _check_sizes(self, *fields: str) -> None:
        name = type(self).__name__
        for field in ("embed_dim", "depth", "num_heads", "patch_size", *fields):
            check(getattr(self, field) > 0, f"{name}.{field}", getattr(self, field), "a positive integer")
        check(
            self.embed_dim % self.num_heads == 0,
            f"{name}.num_heads",
            self.num_heads,
            f"a divisor of embed_dim={self.embed_dim}",
        )


@dataclass(frozen=True, kw_only=True)
class ViTConfig(_PlainTransformer):
    """Plain vision transformer (DeiT, AugReg, MAE, DINOv2, InternViT, CLIP): pre-norm blocks, learned positions.

    Args:
        embed_dim: Width of the tokens.
        depth: Number of blocks.
        num_heads: Self-attention heads.
        mlp_ratio: Hidden width of the MLP over `embed_dim`.
        patch_size: Side of a patch in pixels.
        qkv_bias: Bias of the joint query-key-value linear.
        pos_grid: Side of the square grid of the learned position table, in patches.
        layer_scale: Initial value of the per-channel residual scales; None for a network without them.
        norm: "layernorm", or "rmsnorm" (InternViT-6B).
        norm_eps: Epsilon of the norms.
        qk_norm: Normalise queries and keys over the full width, all heads together (InternViT-6B).
        activation: "gelu"; "gelu_tanh", its approximation in the fused MLP of some published models; "quick_gelu", its
            approximation in OpenAI's CLIP.
        pre_norm: A norm before block 0, and no bias in the patch convolution (CLIP).
        class_token: Prepend a class token. It takes part in self-attention only: interactions and merging see
            patch tokens. It needs global attention, so no window sizes.
        class_position: The class token has an entry in the position table, the first one (CLIP).
    """

    family: ClassVar[str] = "vit"

    embed_dim: int
    depth: int
    num_heads: int
    mlp_ratio: float = 4.0
    patch_size: int = 16
    qkv_bias: bool = True
    pos_grid: int = 14
    layer_scale: float | None = 1.0
    norm: Literal["layernorm", "rmsnorm"] = "layernorm"
    norm_eps: float = 1e-6
    qk_norm: bool = False
    activation: Literal["gelu", "gelu_tanh", "quick_gelu"] = "gelu"
    pre_norm: bool = False
    class_token: bool = False
    class_position: bool = False

    def __post_init__(self) -> None:
        self._check_sizes("pos_grid")
        check_choice("ViTConfig.norm", self.norm, ("layernorm", "rmsnorm"))
        check_choice("ViTConfig.activation", self.activation, ("gelu", "gelu_tanh", "quick_gelu"))
        check(
            self.class_token or not self.class_position,
            "ViTConfig.class_position",
            self.class_position,
            "False for a network with class_token=False",
        )


@dataclass(frozen=True, kw_only=True)
class BEiTConfig(_PlainTransformer):
    """BEiT and BEiTv2: no position embedding, a relative position bias in every block.

    Args:
        embed_dim: Width of the tokens.
        depth: Number of blocks.
        num_heads: Self-attention heads.
        mlp_ratio: Hidden width of the MLP over `embed_dim`.
        patch_size: Side of a patch in pixels.
        qkv_bias: Biases of queries and values; keys have none.
        layer_scale: Initial value of the per-channel residual scales; None for a network without them.
        norm_eps: Epsilon of the layer norms.
        bias_window: Side of the square of tokens whose relative positions each block's table covers; for a block with
            windows it is the window. A global block needs images of exactly that many patches.
    """

    family: ClassVar[str] = "beit"

    embed_dim: int
    depth: int
    num_heads: int
    mlp_ratio: float = 4.0
    patch_size: int = 16
    qkv_bias: bool = True
    layer_scale: float | None = 1e-6
    norm_eps: float = 1e-6
    bias_window: int = 14

    def __post_init__(self) -> None:
        self._check_sizes("bias_window")


@dataclass(frozen=True, kw_only=True)
class UniPerceiverConfig(_PlainTransformer):
    """Image branch of Uni-Perceiver: embeddings for positions and frames, a norm behind them, pre-norm blocks.

    Args:
        embed_dim: Width of the tokens.
        depth: Number of blocks.
        num_heads: Self-attention heads.
        mlp_ratio: Hidden width of the MLP over `embed_dim`.
        patch_size: Side of a patch in pixels.
        pos_grid: Side of the square grid of the learned position table, in patches.
        num_frames: Entries of the frame table; an image is frame 0.
        layer_scale: Initial value of the per-channel residual scales.
        norm_eps: Epsilon of the layer norms.
    """

    family: ClassVar[str] = "uniperceiver"

    embed_dim: int
    depth: int
    num_heads: int
    mlp_ratio: float = 4.0
    patch_size: int = 16
    pos_grid: int = 14
    num_frames: int = 8
    layer_scale: float = 0.0
    norm_eps: float = 1e-5

    def __post_init__(self) -> None:
        self._check_sizes("pos_grid", "num_frames")


@dataclass(frozen=True, kw_only=True)
class ConvNeXtConfig(NetworkConfig):
    """ConvNeXt (version 1): four stages of depthwise-convolution blocks.

    Blocks are numbered through all stages, and the downsampling before each stage but the first counts as one: with
    depths (3, 3, 9, 3), blocks 0-2, downsampling 3, blocks 4-6, downsampling 7, ..., 20.

    Args:
        depths: Blocks of each stage.
        stage_dims: Channels of each stage.
        kernel_size: Side of the depthwise kernels.
        layer_scale: Initial value of the per-channel residual scales; None for a network without them.
        norm_eps: Epsilon of the layer norms.
    """

    family: ClassVar[str] = "convnext"
    no_windows: ClassVar[str] = "a ConvNeXt has no attention"

    depths: tuple[int, ...] = (3, 3, 9, 3)
    stage_dims: tuple[int, ...] = (96, 192, 384, 768)
    kernel_size: int = 7
    layer_scale: float | None = 1e-6
    norm_eps: float = 1e-6

    def __post_init__(self) -> None:
        freeze_sequences(self, "depths", "stage_dims")
        check(
            len(self.depths) == 4 and min(self.depths) > 0,
            "ConvNeXtConfig.depths",
            self.depths,
            "a positive number of blocks for each of 4 stages",
        )
        check(
            len(self.stage_dims) == 4 and min(self.stage_dims) > 0,
            "ConvNeXtConfig.stage_dims",
            self.stage_dims,
            "4 positive widths, one per stage",
        )

    @property
    def depth(self) -> int:
        return sum(self.depths) + len(self.depths) - 1

    @property
    def dims(self) -> tuple[int, ...]:
        return self._per_block(self.stage_dims)

    @property
    def strides(self) -> tuple[int, ...]:
        return self._per_block([4 * 2**stage for stage in range(len(self.depths))])

    def stage_of_blocks(self) -> tuple[tuple[int, int | None], ...]:
        """For every block its stage and its place in it; place None is the downsampling into that stage."""
        stages = (
            [(stage, None)] * (stage > 0) + [(stage, i) for i in range(count)]
            for stage, count in enumerate(self.depths)
        )
        return tuple(itertools.chain.from_iterable(stages))

    def last_blocks(self) -> tuple[int, ...]:
        """Index of the last block of each stage."""
        return tuple(itertools.accumulate(self.depths, lambda last, count: last + 1 + count, initial=-2))[1:]

    def _per_block(self, per_stage: Any) -> tuple[int, ...]:
        return tuple(per_stage[stage] for stage, _ in self.stage_of_blocks())
