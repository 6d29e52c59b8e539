"""Deformable encoder: every cell of every level looks around itself on all levels."""

from __future__ import annotations

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from piip_core.ops import MSDeformAttn

from .positions import Levels

__all__ = ["Encoder", "EncoderLayer"]


class EncoderLayer(nn.Module):
    """Deformable self-attention and FFN, each added and then normalised (Deformable DETR, section 4.1)."""

    def __init__(self, embed_dim: int, ffn_dim: int, num_heads: int, num_levels: int, num_points: int) -> None:
        super().__init__()
        self.self_attn = MSDeformAttn(embed_dim, num_heads, num_levels, num_points)
        self.norm1 = nn.LayerNorm(embed_dim)
        self.linear1 = nn.Linear(embed_dim, ffn_dim)
        self.linear2 = nn.Linear(ffn_dim, embed_dim)
        self.norm2 = nn.LayerNorm(embed_dim)

    def forward(self, x: Tensor, positions: Tensor, reference_points: Tensor, levels: Levels) -> Tensor:
        """Cells (B, S, embed_dim) with `positions` (B, S, embed_dim) to new cells."""
        attended = self.self_attn(x + positions, reference_points, x, levels.shapes, levels.padding_mask)
        x = self.norm1(x + attended)
        return self.norm2(x + self.linear2(self.linear1(x).relu()))


class Encoder(nn.Module):
    """A stack of layers; positions are added anew in each.

    Args:
        num_layers: number of layers.
        use_act_checkpoint: recompute activations in the backward pass to save memory.
        layer_args: arguments of `EncoderLayer`.
    """

    def __init__(self, num_layers: int, *layer_args: int, use_act_checkpoint: bool = False) -> None:
        super().__init__()
        self.layers = nn.ModuleList(EncoderLayer(*layer_args) for _ in range(num_layers))
        self.use_act_checkpoint = use_act_checkpoint

    def forward(self, x: Tensor, positions: Tensor, levels: Levels) -> Tensor:
        """Cells (B, S, embed_dim) to memory (B, S, embed_dim)."""
        reference_points = levels.reference_points()
        for layer in self.layers:
            if self.use_act_checkpoint and self.training:
                x = checkpoint(layer, x, positions, reference_points, levels, use_reentrant=False)
            else:
                x = layer(x, positions, reference_points, levels)
        return x
