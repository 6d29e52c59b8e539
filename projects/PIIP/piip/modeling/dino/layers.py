"""Parts that encoder, decoder and heads share."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from torch import Tensor, nn

__all__ = ["MLP"]


class MLP(nn.Module):
    """Linear layers with ReLU between them.

    Args:
        dims: width of the input, of every hidden layer and of the output.
    """

    def __init__(self, dims: Sequence[int]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(before, after) for before, after in itertools.pairwise(dims))

    def forward(self, x: Tensor) -> Tensor:
        """(..., dims[0]) to (..., dims[-1])."""
        for layer in self.layers[:-1]:
            x = layer(x).relu()
        return self.layers[-1](x)
