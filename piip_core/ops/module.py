"""Multi-scale deformable attention as a module, with the parameters and initialisation of the published models."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .functional import ms_deform_attn
from .reference import compute_dtype, map_sizes


class MSDeformAttn(nn.Module):
    """Multi-scale deformable attention (Deformable DETR, eq. 3), the cross-attention A of PIIP's interactions.

    Every query predicts, per head and level, `num_points` offsets from its reference point and their weights (a
    softmax over all levels and points), and reads the projected values there.

    Offsets, softmax and locations are computed in float32 (float64 for float64 inputs) also under autocast and in
    half-precision models: in bfloat16 a location would be off by up to 1/512 of the map. The four linear layers and
    the values follow autocast.

    Args:
        embed_dim: width of queries and output.
        num_heads: number of heads.
        num_levels: number of value maps.
        num_points: sampled points per head and level.
        value_ratio: the width of the projected values is int(embed_dim * value_ratio), the published deform_ratio.
        value_dim: width of the value input; `embed_dim` if None.

    Raises:
        ValueError: if the width of the projected values is not a positive multiple of `num_heads`.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int = 16,
        num_levels: int = 1,
        num_points: int = 4,
        *,
        value_ratio: float = 1.0,
        value_dim: int | None = None,
    ) -> None:
        super().__init__()
        inner_dim = int(embed_dim * value_ratio)
        if inner_dim < num_heads or inner_dim % num_heads:
            raise ValueError(
                f"embed_dim={embed_dim} with value_ratio={value_ratio} gives values of width {inner_dim}; expected a "
                f"multiple of num_heads={num_heads}. Change num_heads or value_ratio."
            )
        self.num_heads, self.num_levels, self.num_points = num_heads, num_levels, num_points
        self.value_proj = nn.Linear(embed_dim if value_dim is None else value_dim, inner_dim)
        self.sampling_offsets = nn.Linear(embed_dim, num_heads * num_levels * num_points * 2)
        self.attention_weights = nn.Linear(embed_dim, num_heads * num_levels * num_points)
        self.output_proj = nn.Linear(inner_dim, embed_dim)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """The published start: head h looks in direction 2 pi h / num_heads, point p lies p + 1 pixels that way."""
        angle = torch.arange(self.num_heads, dtype=torch.float32) * (2.0 * math.pi / self.num_heads)
        direction = torch.stack((angle.cos(), angle.sin()), dim=-1)
        direction = direction / direction.abs().amax(dim=-1, keepdim=True)
        distance = torch.arange(1, self.num_points + 1, dtype=torch.float32)
        bias = direction[:, None, None, :] * distance[None, None, :, None]
        bias = bias.expand(self.num_heads, self.num_levels, self.num_points, 2)
        nn.init.zeros_(self.sampling_offsets.weight)
        self.sampling_offsets.bias.copy_(bias.reshape(-1))
        nn.init.zeros_(self.attention_weights.weight)
        nn.init.zeros_(self.attention_weights.bias)
        for linear in (self.value_proj, self.output_proj):
            nn.init.xavier_uniform_(linear.weight)
            nn.init.zeros_(linear.bias)

    def forward(
        self,
        query: Tensor,
        reference_points: Tensor,
        value: Tensor,
        spatial_shapes: Sequence[tuple[int, int]],
        padding_mask: Tensor | None = None,
    ) -> Tensor:
        """Reads `value` around the reference points.

        Args:
            query: (B, Q, embed_dim).
            reference_points: (B or 1, Q, num_levels or 1, 2) normalised (x, y), offsets then count in pixels of the
                value map; or (..., 4) boxes (x, y, w, h), offsets then count in halves of the box per point.
            value: (B, S, value_dim), S = sum of H * W over the levels.
            spatial_shapes: (H, W) of every level.
            padding_mask: (B, S) boolean, True where a value is padding: it counts as zero.

        Returns:
            (B, Q, embed_dim).

        Raises:
            ValueError: for reference points that are neither points nor boxes; see also `ms_deform_attn`.
        """
        value = self.value_proj(value)
        if padding_mask is not None:
            value = value.masked_fill(padding_mask[..., None], 0.0)
        value = value.unflatten(-1, (self.num_heads, -1))
        locations, weights = self.sampling(query, reference_points, spatial_shapes)
        return self.output_proj(ms_deform_attn(value, spatial_shapes, locations, weights))

    def sampling(
        self, query: Tensor, reference_points: Tensor, spatial_shapes: Sequence[tuple[int, int]]
    ) -> tuple[Tensor, Tensor]:
        """Where every query reads, and how much each point counts; arguments as in `forward`.

        Returns:
            Locations (B, Q, num_heads, num_levels, num_points, 2), normalised (x, y), and weights (B, Q, num_heads,
            num_levels, num_points) that sum to 1 over levels and points; float64 for float64 queries, else float32.

        Raises:
            ValueError: for reference points that are neither points nor boxes.
        """
        shape = (*query.shape[:2], self.num_heads, self.num_levels, self.num_points)
        offsets, logits = self.sampling_offsets(query), self.attention_weights(query)
        dtype = compute_dtype(offsets.dtype)
        weights = logits.to(dtype).view(*shape[:3], -1).softmax(dim=-1).view(shape)
        offsets = offsets.to(dtype).view(*shape, 2)
        reference = reference_points.to(dtype)[:, :, None, :, None, :]
        if reference.shape[-1] == 2:
            flat = [size for pair in spatial_shapes for size in pair]
            return reference + offsets / map_sizes(flat, offsets), weights
        if reference.shape[-1] == 4:
            return reference[..., :2] + offsets * (reference[..., 2:] * (0.5 / self.num_points)), weights
        raise ValueError(
            f"reference_points ends in an axis of {reference.shape[-1]}; expected 2 for points (x, y) or 4 for boxes "
            "(x, y, w, h)"
        )
