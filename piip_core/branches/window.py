"""Self-attention over token maps, global or in windows."""

from __future__ import annotations

import torch.nn.functional as F
from timm.layers.attention import Attention
from timm.models.vision_transformer_sam import window_partition, window_unpartition
from torch import Tensor

__all__ = ["MapAttention"]


class MapAttention(Attention):
    """timm's self-attention (same parameters) that also takes channels-last maps, and then may work in windows.

    Windows are folded into the batch and no mask is passed, so any fused attention kernel applies. There is no shift.

    Attributes:
        window_size: Side of the windows in tokens; None for global attention.
        pad_before_qkv: Where a map that is no multiple of the window is padded with zeros. Before the projection, the
            padded keys and values equal the qkv bias and take part in the softmax, as in every published model;
            after it, they are zero.
    """

    window_size: int | None = None
    pad_before_qkv: bool = True

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """Attends within `x`: a sequence (B, N, C), always globally, or a map (B, H, W, C)."""
        if x.ndim == 3:
            return super().forward(x, attn_mask, is_causal)
        height, width = x.shape[1:3]
        if self.window_size is None:
            return super().forward(x.flatten(1, 2), attn_mask, is_causal).unflatten(1, (height, width))
        if not self.pad_before_qkv:
            return self._forward_projected_windows(x)
        windows, padded = window_partition(x, self.window_size)
        windows = super().forward(windows.flatten(1, 2))
        return window_unpartition(windows, self.window_size, (height, width), padded)

    def _forward_projected_windows(self, x: Tensor) -> Tensor:
        windows, padded = window_partition(self.qkv(x), self.window_size)
        qkv = windows.flatten(1, 2).unflatten(2, (3, self.num_heads, self.head_dim))
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        out = F.scaled_dot_product_attention(self.q_norm(q), self.k_norm(k), v)
        out = out.transpose(1, 2).flatten(2)
        return self.proj(window_unpartition(out, self.window_size, tuple(x.shape[1:3]), padded))
