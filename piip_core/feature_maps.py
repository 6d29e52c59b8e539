"""Which feature maps a pyramid can give: one per branch and interaction."""

from __future__ import annotations

from dataclasses import dataclass

from .config import PIIPConfig

__all__ = ["FeatureMap", "feature_maps"]


@dataclass(frozen=True, kw_only=True)
class FeatureMap:
    """A map that a branch has somewhere on its way.

    Args:
        branch: Number of the branch, from 1.
        interaction: Behind this interaction, from 0; None for behind the blocks that follow the last one.
        dim: Channels.
        reduction: Pixels of the input image per cell; fractional where the branch shrinks the image by a fraction.
        final: Whether it is the last map of its branch.
    """

    branch: int
    interaction: int | None
    dim: int
    reduction: float
    final: bool


def feature_maps(config: PIIPConfig) -> tuple[FeatureMap, ...]:
    """All maps of a pyramid, from the finest to the coarsest.

    For branches of one stride each, as ViTs are, that is branch by branch, the one with the largest image first, and
    inside a branch from its first interaction to its end.
    """
    order = sorted(range(len(config.branches)), key=lambda i: -config.branches[i].image_size)
    found = [feature for i in order for feature in _maps_of_branch(config, i)]
    return tuple(sorted(found, key=lambda feature: feature.reduction))


def _maps_of_branch(config: PIIPConfig, index: int) -> list[FeatureMap]:
    branch, segments = config.branches[index], config.segments(index + 1)
    points: list[int | None] = list(range(config.num_interactions))
    if not segments or segments[-1][1] + 1 < branch.network.depth:
        points.append(None)
    shrunk = config.branches[config.largest_image - 1].image_size / branch.image_size
    return [
        FeatureMap(
            branch=index + 1,
            interaction=point,
            dim=config.dims_after(point)[index],
            reduction=_whole(config.strides_after(point)[index] * shrunk),
            final=point == points[-1],
        )
        for point in points
    ]


def _whole(value: float) -> float:
    """An integer where the value is one."""
    return int(value) if value == int(value) else value
