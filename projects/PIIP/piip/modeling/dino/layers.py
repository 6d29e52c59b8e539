"""Encoder and decoder of DINO: layers with deformable attention, and the MLP of its heads."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from piip_core.ops import MSDeformAttn

from .boxes import inverse_sigmoid
from .positions import Levels, box_encoding


class MLP(nn.Module):
    """Linear layers with ReLU between them; `dims` are the widths of input, hidden layers and output."""

    def __init__(self, dims: Sequence[int]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(before, after) for before, after in itertools.pairwise(dims))

    def forward(self, x: Tensor) -> Tensor:
        """(..., dims[0]) to (..., dims[-1])."""
        for layer in self.layers[:-1]:
            x = layer(x).relu()
        return self.layers[-1](x)


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
    """A stack of `EncoderLayer`s, whose arguments are `layer_args`; positions are added anew in each."""

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


class DecoderLayer(nn.Module):
    """Self-attention, deformable cross-attention and FFN, each added and then normalised."""

    def __init__(self, embed_dim: int, ffn_dim: int, num_heads: int, num_levels: int, num_points: int) -> None:
        super().__init__()
        self.self_attn = nn.MultiheadAttention(embed_dim, num_heads, batch_first=True)
        self.norm1 = nn.LayerNorm(embed_dim)
        self.cross_attn = MSDeformAttn(embed_dim, num_heads, num_levels, num_points)
        self.norm2 = nn.LayerNorm(embed_dim)
        self.linear1 = nn.Linear(embed_dim, ffn_dim)
        self.linear2 = nn.Linear(ffn_dim, embed_dim)
        self.norm3 = nn.LayerNorm(embed_dim)

    def forward(
        self,
        x: Tensor,
        query_pos: Tensor,
        reference_boxes: Tensor,
        memory: Tensor,
        levels: Levels,
        attention_mask: Tensor | None = None,
    ) -> Tensor:
        """Content of the queries (B, Q, embed_dim) to new content; see `Decoder`.

        `query_pos` (B, Q, embed_dim) is added wherever queries ask, and `reference_boxes` (B, Q, levels, 4) are in
        fractions of each padded map.
        """
        query = x + query_pos
        attended, _ = self.self_attn(query, query, x, attn_mask=attention_mask, need_weights=False)
        x = self.norm1(x + attended)
        attended = self.cross_attn(x + query_pos, reference_boxes, memory, levels.shapes, levels.padding_mask)
        x = self.norm2(x + attended)
        return self.norm3(x + self.linear2(self.linear1(x).relu()))


class Decoder(nn.Module):
    """A stack of `DecoderLayer`s, whose arguments are `layer_args`, with iterative refinement of boxes."""

    def __init__(self, num_layers: int, *layer_args: int) -> None:
        super().__init__()
        self.embed_dim = layer_args[0]
        self.layers = nn.ModuleList(DecoderLayer(*layer_args) for _ in range(num_layers))
        self.norm = nn.LayerNorm(self.embed_dim)
        self.ref_point_head = MLP((2 * self.embed_dim, self.embed_dim, self.embed_dim))

    def forward(
        self,
        x: Tensor,
        boxes: Tensor,
        memory: Tensor,
        levels: Levels,
        bbox_embed: Sequence[nn.Module],
        attention_mask: Tensor | None = None,
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Runs all layers.

        Args:
            x: (B, Q, embed_dim) initial content of the queries.
            boxes: (B, Q, 4) initial boxes (cx, cy, w, h), without gradient.
            memory: (B, S, embed_dim) of the encoder.
            levels: Layout of the memory.
            bbox_embed: The regression branch of every layer.
            attention_mask: (Q, Q) bool, True where a query (row) must not see another.

        Returns:
            Normalised content (B, Q, embed_dim) after every layer, and the boxes (B, Q, 4) that every layer started
            from, then those after the last. Layers see boxes without gradient; these have it, so that the prediction
            after a layer reaches the one before ("look forward twice").
        """
        ratios = levels.valid_ratios.repeat(1, 1, 2)[:, None]  # (B, 1, levels, 4)
        hidden, references = [], [boxes]
        for layer, refine in zip(self.layers, bbox_embed, strict=True):
            seen = boxes[:, :, None] * ratios
            # as published, of the boxes in the padded map: more padding moves them
            query_pos = self.ref_point_head(box_encoding(seen[:, :, 0], self.embed_dim))
            x = layer(x, query_pos, seen, memory, levels, attention_mask)
            refined = torch.sigmoid(refine(x) + inverse_sigmoid(boxes))
            hidden.append(self.norm(x))
            references.append(refined)
            boxes = refined.detach()
        return hidden, references
