"""Backbone maps to one width, and one more level."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from detectron2.layers import Conv2d
from torch import Tensor, nn

__all__ = ["ChannelMapper"]


class ChannelMapper(nn.Module):
    """Projects every map by a 1x1 convolution, and makes one more level of half the size from the last backbone map.

    All convolutions are without bias and followed by a group norm; there is no activation.

    Args:
        in_dims: channels of the backbone's maps, largest map first.
        embed_dim: channels of every output map.
        num_groups: groups of the norms.

    Raises:
        ValueError: if `embed_dim` is not a multiple of `num_groups`.
    """

    def __init__(self, in_dims: Sequence[int], embed_dim: int, *, num_groups: int = 32) -> None:
        super().__init__()
        if embed_dim % num_groups:
            raise ValueError(
                f"embed_dim={embed_dim}: expected a multiple of the {num_groups} groups of the neck's norms"
            )
        kernels = [(dim, 1) for dim in in_dims] + [(in_dims[-1], 3)]
        self.convs = nn.ModuleList(
            Conv2d(
                dim,
                embed_dim,
                kernel,
                stride=2 if kernel == 3 else 1,
                padding=kernel // 2,
                bias=False,
                norm=nn.GroupNorm(num_groups, embed_dim),
            )
            for dim, kernel in kernels
        )
        for conv in self.convs:
            nn.init.xavier_uniform_(conv.weight)

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """Maps (B, C_l, H_l, W_l) to maps (B, embed_dim, H_l, W_l) and one (B, embed_dim, H/2, W/2), rounded up."""
        return [conv(x) for conv, x in zip(self.convs, [*maps, maps[-1]], strict=True)]

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the weights."""
        return self.convs[0].weight.dtype
