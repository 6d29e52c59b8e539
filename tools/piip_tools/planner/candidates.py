"""Budgets, the pyramids that can be proposed with their cost, and the published models to compare them with."""

from __future__ import annotations

import itertools
import math
import re
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Literal

from piip_core.config import PIIPConfig
from piip_core.errors import ConfigError
from piip_core.zoo import VIT, ZooEntry, deit_pyramid, entries

from ..flops.published import PublishedCount, published_count

MODEL_SIZES = "TSBL"
"""DeiT models, smallest first."""
IMAGE_SIZES = tuple(range(1792, 223, -112))
"""Image sides, largest first: multiples of half the padding of the published pyramids."""

Kind = Literal["flops", "memory", "latency"]

_UNITS: dict[str, tuple[Kind, float]] = {
    "G": ("flops", 1e9),
    "T": ("flops", 1e12),
    "MB": ("memory", 1e6),
    "GB": ("memory", 1e9),
    "ms": ("latency", 1e-3),
    "s": ("latency", 1.0),
}


@dataclass(frozen=True)
class Budget:
    """What a model may cost: multiply-accumulates by the published count, or for one image bytes or seconds."""

    kind: Kind
    limit: float

    def text(self, value: float | None = None) -> str:
        """The limit, or a value of the same kind, with its unit."""
        value = self.limit if value is None else value
        if self.kind == "flops":
            return f"{value / 1e9:.0f}G"
        if self.kind == "memory":
            return f"{value / 1e9:.2f}GB"
        return f"{value * 1e3:.0f}ms" if value < 10 else f"{value:.1f}s"


def parse_budget(text: str) -> Budget:
    """Reads a budget such as 450G, 1.5T (multiply-accumulates), 12GB, 800ms or 2s.

    Raises:
        ConfigError: For anything else.
    """
    value, unit = _split(text)
    if unit not in _UNITS or not value:
        raise ConfigError(
            f"budget {text!r}: expected a positive number with a unit: 450G or 1.5T (FLOPs), 12GB or 800MB (memory), "
            "800ms or 2s (latency)"
        )
    kind, scale = _UNITS[unit]
    return Budget(kind, value * scale)


def parse_count(text: str) -> int:
    """Reads a number of parameters such as 200M or 1.2G.

    Raises:
        ConfigError: For anything else.
    """
    value, unit = _split(text)
    if unit not in ("M", "G") or not value:
        raise ConfigError(f"{text!r}: expected a positive number of parameters such as 200M")
    return round(value * {"M": 1e6, "G": 1e9}[unit])


def _split(text: str) -> tuple[float, str]:
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)", text.strip())
    return (float(found[1]), found[2]) if found else (0.0, "")


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A parameter-inverted pyramid of DeiT models: the smaller a model, the larger its image (paper section III-A)."""

    models: str  # sizes of the models, smallest first, as in the published names
    image_sizes: tuple[int, ...]  # image side of each, largest first

    @cached_property
    def count(self) -> PublishedCount:
        """Parameters and multiply-accumulates as the published tables count them."""
        return published_count(self.config)

    @property
    def params(self) -> int:
        """By the published count."""
        return self.count.total.params

    @property
    def flops(self) -> int:
        """Multiply-accumulates by the published count."""
        return self.count.total.macs

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
        """Part of all FLOPs that each branch takes, in the order of `models`; the rest is interactions and head."""
        return tuple(branch.macs / self.flops for branch in reversed(self.count.branches))


@cache
def candidates(branches: int) -> tuple[Candidate, ...]:
    """All pyramids with a number of branches; to count them takes some seconds.

    Raises:
        ConfigError: For a number of branches that the paper has not: it uses 2, 3 and 4 (section III-A).
    """
    if branches not in (2, 3, 4):
        raise ConfigError(f"{branches} branches: expected 2, 3 or 4")
    return tuple(
        Candidate(models="".join(models), image_sizes=sides)
        for models in itertools.combinations(MODEL_SIZES, branches)
        for sides in itertools.combinations(IMAGE_SIZES, branches)
    )


@cache
def published_mask_rcnn() -> tuple[tuple[ZooEntry, float, float | None], ...]:
    """Published Mask R-CNN models, each with its GFLOPs (ours where none are printed) and box AP where printed."""
    return tuple(
        (
            entry,
            entry.published.flops_g or entry.paper.flops_g or published_count(entry.config).total.macs / 1e9,
            entry.published.box_ap or entry.paper.box_ap,
        )
        for entry in entries()
        if entry.head == "mask_rcnn"
    )


def same_models(a: PIIPConfig, b: PIIPConfig) -> bool:
    """Whether two models have the same networks with the same pretrained weights, whatever the image sizes."""
    return [(x.network, x.pretrained) for x in a.branches] == [(x.network, x.pretrained) for x in b.branches]


def nearest_published(wanted: Candidate) -> tuple[ZooEntry, float, float | None] | None:
    """The one of `published_mask_rcnn` with the same models whose FLOPs are nearest, if there is one."""
    same = [known for known in published_mask_rcnn() if known[2] and same_models(known[0].config, wanted.config)]
    return min(same, key=lambda known: abs(math.log(known[1] * 1e9 / wanted.flops)), default=None)
