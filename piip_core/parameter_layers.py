"""Layer numbers of a pyramid's parameters, for layer-wise learning-rate decay."""

from __future__ import annotations

from .branches import Branch
from .pyramid import PIIP

__all__ = ["ParameterLayers"]


class ParameterLayers:
    """Layer of every parameter, as in the published training.

    Let d be the number of blocks of the first branch that takes part, which ConvNeXt branches do not. There are d + 2
    layers: embeddings are layer 0, block l of that branch is layer l + 1, block l of a branch with d' blocks is layer
    (l + 1) * d / d', which may be fractional, and everything else is the last layer, d + 1.

    Args:
        pyramid: The pyramid.
        coarse: Number the stages between interactions instead: embeddings are 0, the blocks before the first
            interaction 1, and so on; everything else is the last.

    Attributes:
        last: The last layer, that of interactions and heads; 0 if no branch takes part.
    """

    def __init__(self, pyramid: PIIP, *, coarse: bool = False) -> None:
        self.pyramid, self.coarse = pyramid, coarse
        taking_part = [branch for branch in pyramid.branches if _takes_part(branch)]
        self.depth = taking_part[0].num_blocks if taking_part else 0
        stages = pyramid.config.num_interactions + 1 if coarse else self.depth
        self.last = stages + 1 if taking_part else 0

    def __call__(self, name: str) -> float:
        """Layer of a parameter by its name relative to the pyramid."""
        parts = name.split(".", 2)
        if parts[0] != "branches":
            return self.last
        index, branch = int(parts[1]), self.pyramid.branches[int(parts[1])]
        layer = branch.layer_of(parts[2])
        if layer is None:
            return self.last
        if not self.coarse or layer == 0:
            return layer * self.depth / branch.num_blocks
        return 1 + sum(last < layer - 1 for _, last in self.pyramid.segments[index])


def _takes_part(branch: Branch) -> bool:
    return any(branch.layer_of(name) is not None for name, _ in branch.named_parameters())
