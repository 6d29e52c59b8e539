"""Self-attention over token maps, global or in windows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from timm.layers import Attention
from timm.models.vision_transformer_sam import window_partition, window_unpartition
from torch import Tensor, nn

__all__ = ["FullWidthNormAttention", "MapAttention", "attend_in_windows"]


def attend_in_windows(x: Tensor, window_size: int, attend: Callable[[Tensor], Tensor]) -> Tensor:
    """Runs self-attention inside the windows of a map.

    Windows are folded into the batch and no mask is passed, so any fused attention kernel applies. There is no shift.
    A map that is no multiple of the window is padded with zeros at the bottom and right, which take part.

    Args:
        x: (B, H, W, C).
        window_size: Side of the windows in tokens.
        attend: Self-attention over sequences (B, N, C).
    """
    windows, padded = window_partition(x, window_size)
    grid = windows.shape[1:3]
    windows = attend(windows.flatten(1, 2)).unflatten(1, grid)
    return window_unpartition(windows, window_size, tuple(x.shape[1:3]), padded)


class MapAttention(Attention):
    """timm's self-attention (same parameters) that also takes channels-last maps, and then may work in windows.

    Attributes:
        window_size: Side of the windows in tokens; None for global attention.
        pad_before_qkv: Where a map that is no multiple of the window is padded with zeros. Before the projection, the
            padded keys and values equal the qkv bias and take part in the softmax, as in every published model;
            after it, they are zero.
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

    def __init__(self, dim: int, *args: object, norm_layer: Callable[[int], nn.Module], **kwargs: object) -> None:
        super().__init__(dim, *args, norm_layer=norm_layer, **kwargs)
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
