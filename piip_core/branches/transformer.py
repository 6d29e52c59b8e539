"""What branches made of timm's transformer blocks share: sizes, attention in windows, positions."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from timm.layers import Attention
from timm.models.beit import Beit
from timm.models.eva import Eva
from timm.models.naflexvit import NaFlexVit
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from ..errors import check
from .base import Branch, BranchConfig, BranchState, NetworkConfig, set_drop_path

MAX_POSITIONS = 16


@dataclass(frozen=True, kw_only=True)
class PlainTransformerConfig(NetworkConfig):
    """What all plain vision transformers share: one width and one stride.

    Args:
        embed_dim: Width of the tokens.
        depth: Number of blocks.
        num_heads: Self-attention heads.
        mlp_ratio: Hidden width of the MLP over `embed_dim`.
        patch_size: Side of a patch in pixels.
        norm_eps: Epsilon of the norms.
    """

    embed_dim: int
    depth: int
    num_heads: int
    mlp_ratio: float = 4.0
    patch_size: int = 16
    norm_eps: float = 1e-6

    def __post_init__(self) -> None:
        name = type(self).__name__
        for field in dataclasses.fields(self):
            if field.type in (int, "int"):
                value = getattr(self, field.name)
                check(value > 0, f"{name}.{field.name}", value, "a positive integer")
        divides = self.embed_dim % self.num_heads == 0
        check(divides, f"{name}.num_heads", self.num_heads, f"a divisor of embed_dim={self.embed_dim}")
        self.set_blocks((self.embed_dim,) * self.depth, (self.patch_size,) * self.depth)


def ceil_div(length: int, side: int) -> int:
    """Rounds up. Not by way of negative numbers, whose division ONNX rounds towards zero."""
    return (length + side - 1) // side


def split_windows(x: Tensor, size: tuple[int, int]) -> Tensor:
    """Windows (..., N, h * w, C) of a map (..., H, W, C), row by row; zeros fill it up at the bottom and right.

    `size` is height and width of a window.
    """
    height, width = size
    rows, columns = (ceil_div(length, side) for length, side in zip(x.shape[-3:-1], size, strict=True))
    x = F.pad(x, (0, 0, 0, columns * width - x.shape[-2], 0, rows * height - x.shape[-3]))
    x = x.unflatten(-3, (-1, height)).unflatten(-2, (-1, width))
    return x.transpose(-4, -3).flatten(-3, -2).flatten(-4, -3)


def join_windows(windows: Tensor, size: tuple[int, int], grid: Sequence[int]) -> Tensor:
    """Inverse of `split_windows` for maps of `grid` cells."""
    rows, columns = (ceil_div(length, side) for length, side in zip(grid, size, strict=True))
    x = windows.unflatten(-3, (rows, columns)).unflatten(-2, size).transpose(-4, -3)
    return x.flatten(-3, -2).flatten(-4, -3)[..., : grid[0], : grid[1], :]


def attend_in_windows(x: Tensor, window_size: int, attend: Callable[[Tensor], Tensor]) -> Tensor:
    """Runs self-attention inside the windows of a map (B, H, W, C).

    Windows are folded into the batch and no mask is passed, so any fused attention kernel applies. There is no shift.
    A map that is no multiple of the window is padded with zeros at the bottom and right, which take part.

    Args:
        x: The map.
        window_size: Side of the windows in tokens.
        attend: Self-attention over sequences (B, N, C).
    """
    size = (window_size, window_size)
    windows = split_windows(x, size)
    attended = attend(windows.flatten(0, 1)).unflatten(0, windows.shape[:2])
    return join_windows(attended, size, x.shape[1:3]).contiguous()


class MapAttention(Attention):
    """timm's self-attention (same parameters) that also takes channels-last maps, and then may work in windows.

    Attributes:
        window_size: Side of the windows in tokens; None for global attention.
        pad_before_qkv: Where a map that is no multiple of the window is padded with zeros; see
            `BranchConfig.window_padding`.
    """

    window_size: int | None = None
    pad_before_qkv: bool = True

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Attends within `x`: a sequence (B, N, C), always globally, or a map (B, H, W, C).

        Further arguments are those of timm's; windows know none.
        """
        if x.ndim == 3:
            return self.attend(x, *args, **kwargs)
        if self.window_size is None:
            return self.attend(x.flatten(1, 2), *args, **kwargs).unflatten(1, x.shape[1:3])
        if self.pad_before_qkv:
            return attend_in_windows(x, self.window_size, self.attend)
        return self.proj(attend_in_windows(self.qkv(x), self.window_size, self.attend_projected))

    def attend(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Global attention within sequences (B, N, C)."""
        return super().forward(x, *args, **kwargs)

    def attend_projected(self, qkv: Tensor) -> Tensor:
        """Attention from queries, keys and values side by side, (B, N, 3C) to (B, N, C), before the last linear."""
        q, k, v = self.split_heads(qkv)
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)

    def split_heads(self, qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values (B, heads, N, head width), normalised where the network does so."""
        qkv = qkv.unflatten(2, (3, self.num_heads, self.head_dim))
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        return self.q_norm(q), self.k_norm(k), v


class FullWidthNormAttention(MapAttention):
    """Normalises queries and keys over the full width, all heads together (InternViT-6B); timm does it per head."""

    def __init__(self, dim: int, *, norm_layer: type[nn.Module], **options: Any) -> None:
        super().__init__(dim, norm_layer=norm_layer, **options)
        self.q_norm, self.k_norm = norm_layer(dim), norm_layer(dim)

    def attend(self, x: Tensor, *_: Any, **__: Any) -> Tensor:
        """Global attention within sequences (B, N, C), by PyTorch's kernels."""
        return self.proj(self.attend_projected(self.qkv(x)))

    def split_heads(self, qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Splits (B, N, 3C) into heads (B, heads, N, head width), after the norms of queries and keys."""
        q, k, v = qkv.chunk(3, dim=2)
        heads = (self.num_heads, self.head_dim)
        q, k, v = (t.unflatten(2, heads).transpose(1, 2) for t in (self.q_norm(q), self.k_norm(k), v))
        return q, k, v


def resize_position_grid(grid: Tensor, height: int, width: int) -> Tensor:
    """Resizes position embeddings (1, N, C) of a square, row by row, to (1, height, width, C) in their dtype.

    Bicubic, in fp32, without antialiasing, as published.
    """
    side = int(grid.shape[1] ** 0.5)
    if (height, width) == (side, side):
        return grid.unflatten(1, (side, side))
    # Not a permutation of four dimensions, which ONNX Runtime would move behind Resize, and then refuse
    table = grid.transpose(1, 2).unflatten(2, (side, side)).float()
    table = F.interpolate(table, size=(height, width), mode="bicubic", align_corners=False)
    return table.flatten(2).transpose(1, 2).unflatten(1, (height, width)).to(grid.dtype)


class TransformerBranch(Branch):
    """A transformer of timm, without its final norm and head, run on channels-last token maps.

    The state dict below `model.` has timm's names.

    Args:
        config: The branch.
        model: The network, with `patch_embed` (channels-last output) and `blocks`.

    Attributes:
        keep_positions: Whether resized position embeddings are kept, for weights that do not change any more.
    """

    keep_positions = False
    model: VisionTransformer | Eva | NaFlexVit | Beit

    def __init__(self, config: BranchConfig, model: VisionTransformer | Eva | NaFlexVit | Beit) -> None:
        super().__init__(config)
        self.model = model
        self._positions: dict[tuple[object, ...], Tensor] = {}
        set_drop_path([*model.blocks], config)
        for block, window in zip(model.blocks, config.window_sizes, strict=True):
            attention: Any = getattr(block, "attn", None)  # parallel blocks have several, or none of their own
            if hasattr(attention, "window_size"):
                attention.window_size = window
            if isinstance(attention, MapAttention):
                attention.pad_before_qkv = config.window_padding == "before_qkv"

    def crop(self, image: Tensor) -> Tensor:
        """Cuts a remainder of the patch size at the bottom and right of an image (B, 3, H, W)."""
        patch = self.strides[0]
        height, width = (side // patch * patch for side in image.shape[-2:])
        return image[..., :height, :width]

    def patch_map(self, image: Tensor) -> Tensor:
        """Patch embeddings (B, H, W, C) of an image; a remainder of the patch size is cut at the bottom and right."""
        # The convolution leaves channels first in memory, and every sum after it would inherit that
        return cast(nn.Module, self.model.patch_embed)(self.crop(image)).contiguous()

    def position_map(self, grid: Tensor, height: int, width: int) -> Tensor:
        """`resize_position_grid` of the position embeddings, once per size where `keep_positions` says so."""
        if not self.keep_positions or torch.compiler.is_compiling():
            return resize_position_grid(grid, height, width)
        key = height, width, grid.dtype, grid.device
        if key not in self._positions:
            with torch.inference_mode(False), torch.no_grad():
                table = resize_position_grid(grid.clone(), height, width).contiguous()
            if type(table) is not Tensor:  # a fake tensor must not outlive its mode
                return table
            if len(self._positions) >= MAX_POSITIONS:
                self._positions.clear()
            self._positions[key] = table
        return self._positions[key]

    def run_block(self, state: BranchState, index: int) -> BranchState:
        """Runs one block on the map (B, H, W, C), or on the sequence of prefix and map."""
        block: Any = self.model.blocks[index]
        grid, prefix = state.tokens.shape[1:3], state.prefix
        if prefix is None and hasattr(getattr(block, "attn", None), "window_size"):  # takes maps
            return state._replace(tokens=block(state.tokens))
        sequence = block(state.sequence(), **self.block_arguments(state, index))
        if prefix is not None:
            prefix, sequence = sequence[:, : prefix.shape[1]], sequence[:, prefix.shape[1] :]
        return state._replace(tokens=sequence.unflatten(1, grid), prefix=prefix)

    def block_arguments(self, state: BranchState, index: int) -> dict[str, Any]:
        """What a block takes besides its sequence."""
        return {}

    def layer_of(self, name: str) -> int | None:
        """Index + 1 for parameters of blocks, 0 for all others."""
        parts = name.split(".")[1:]  # without "model"
        return int(parts[1]) + 1 if parts[:1] == ["blocks"] else 0
