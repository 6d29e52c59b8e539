"""Pyramids that can be proposed, with their cost, and the published models to compare them with."""

from __future__ import annotations

import dataclasses
import itertools
import math
from dataclasses import dataclass
from functools import cache

from piip_core.config import PIIPConfig
from piip_core.errors import ConfigError
from piip_core.zoo import VIT, ZooEntry, deit_pyramid, entries

from ..flops import published_count

__all__ = [
    "IMAGE_SIZES",
    "MODEL_SIZES",
    "Candidate",
    "candidates",
    "nearest_published",
    "published_mask_rcnn",
    "same_models",
]

MODEL_SIZES = "TSBL"
"""DeiT models, smallest first."""
IMAGE_SIZES = tuple(range(1792, 223, -112))
"""Image sides, largest first: multiples of half the padding of the published pyramids."""


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A parameter-inverted pyramid of DeiT models: the smaller the model, the larger its image (paper section III-A).

    Args:
        models: Sizes of the models, smallest first, as in the published names.
        image_sizes: Image side of each, largest first.
        params: By the published count.
        flops: Multiply-accumulates by the published count.
        branch_flops: Those of each branch, in the order of `models`; the rest is interactions and head.
    """

    models: str
    image_sizes: tuple[int, ...]
    params: int
    flops: int
    branch_flops: tuple[int, ...]

    @property
    def window_size(self) -> int:
        """Side of the attention windows in tokens, as in the published pyramids: with ViT-L they have larger ones."""
        return 28 if "L" in self.models else 14

    @property
    def largest_width(self) -> int:
        """Width of the largest model, Branch 1."""
        return VIT[self.models[-1]].embed_dim

    @property
    def config(self) -> PIIPConfig:
        """The backbone."""
        return deit_pyramid(self.models, self.image_sizes, self.window_size)

    @property
    def name(self) -> str:
        """Name in the style of the published models: piip_tsb_1568_1120_672."""
        return "_".join(["piip", self.models.lower(), *map(str, self.image_sizes)])

    @property
    def title(self) -> str:
        """Name as the published tables print it."""
        return f"{self.models} {'/'.join(map(str, self.image_sizes))}"

    @property
    def shares(self) -> tuple[float, ...]:
        """Part of all FLOPs that each branch takes, in the order of `models`."""
        return tuple(flops / self.flops for flops in self.branch_flops)

    @property
    def ratios(self) -> tuple[float, ...]:
        """Side of each image relative to the next smaller one."""
        return tuple(a / b for a, b in itertools.pairwise(self.image_sizes))


def _counted(models: str, image_sizes: tuple[int, ...]) -> Candidate:
    """Counts one pyramid."""
    uncounted = Candidate(models=models, image_sizes=image_sizes, params=0, flops=0, branch_flops=())
    count = published_count(uncounted.config)
    return dataclasses.replace(
        uncounted,
        params=count.total.params,
        flops=count.total.macs,
        branch_flops=tuple(branch.macs for branch in reversed(count.branches)),
    )


@cache
def candidates(branches: int) -> tuple[Candidate, ...]:
    """All pyramids with a number of branches, counted (takes some seconds the first time).

    Raises:
        ConfigError: For a number of branches that the paper has not: it uses 2, 3 and 4 (section III-A).
    """
    if branches not in (2, 3, 4):
        raise ConfigError(f"{branches} branches: expected 2, 3 or 4")
    return tuple(
        _counted("".join(models), sides)
        for models in itertools.combinations(MODEL_SIZES, branches)
        for sides in itertools.combinations(IMAGE_SIZES, branches)
    )


@cache
def published_mask_rcnn() -> tuple[tuple[ZooEntry, float, float | None], ...]:
    """Published Mask R-CNN models, each with its GFLOPs (ours where none are printed) and box AP where printed."""
    return tuple(
        (
            row,
            row.published.flops_g or row.paper.flops_g or published_count(row.config).total.macs / 1e9,
            row.published.box_ap or row.paper.box_ap,
        )
        for row in entries()
        if row.head == "mask_rcnn"
    )


def same_models(a: PIIPConfig, b: PIIPConfig) -> bool:
    """Whether two models have the same networks with the same pretrained weights, whatever the image sizes."""
    return [(x.network, x.pretrained) for x in a.branches] == [(x.network, x.pretrained) for x in b.branches]


def nearest_published(wanted: Candidate) -> tuple[ZooEntry, float, float | None] | None:
    """The published row with the same models whose FLOPs are nearest, as in `published_mask_rcnn`, if there is one."""
    same = [row for row in published_mask_rcnn() if row[2] and same_models(row[0].config, wanted.config)]
    return min(same, key=lambda row: abs(math.log(row[1] * 1e9 / wanted.flops)), default=None)
