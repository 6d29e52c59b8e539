"""Budgets, the pyramids that can be proposed with their cost, and the published models to compare them with."""

from __future__ import annotations

import itertools
import math
import re
from dataclasses import dataclass, replace
from functools import cache, cached_property
from typing import Literal

from piip_core.config import ClassifierConfig, PIIPConfig
from piip_core.errors import ConfigError
from piip_core.zoo import VIT, ZooEntry, deit_pyramid, entries, families

from ..flops.published import PublishedCount, published_count

MODEL_SIZES = "TSBL"
"""DeiT models, smallest first."""
IMAGE_SIZES = tuple(range(1792, 223, -112))
"""Image sides, largest first: multiples of half the padding of the published pyramids."""
CLASSIFIER_SIZES = tuple(range(512, 95, -32))
"""Those of classifiers."""

Task = Literal["detection", "segmentation", "classification"]
Models = str | tuple[str, ...]
"""Sizes of DeiT models as in "TSB", or networks as `zoo.families` names them, in any case smallest first."""

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
    """A parameter-inverted pyramid: the smaller a model, the larger its image (paper section III-A).

    `image_sizes` has the image side of each of the `models`, largest first.
    """

    models: Models
    image_sizes: tuple[int, ...]
    task: Task = "detection"

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
    def window_size(self) -> int | None:
        """Side of the attention windows in tokens, as in the published pyramids: with ViT-L they have larger ones."""
        if self.task == "classification":
            return None
        return 28 if self.largest_width >= VIT["L"].embed_dim else 14

    @property
    def largest_width(self) -> int:
        """Width of the largest model, Branch 1."""
        if isinstance(self.models, str):
            return VIT[self.models[-1]].embed_dim
        return families.network(self.models[-1]).dims[-1]

    @property
    def config(self) -> PIIPConfig | ClassifierConfig:
        """The backbone, or the classifier."""
        if self.task == "classification":
            return families.classifier(self.label, self.image_sizes)
        if isinstance(self.models, str):
            return deit_pyramid(self.models, self.image_sizes, self.window_size)
        return families.pyramid(self.label, self.image_sizes, window_size=self.window_size)

    @property
    def name(self) -> str:
        """Name in the style of the published models: piip_tsb_1568_1120_672."""
        if isinstance(self.models, tuple):
            return families.slug(self.label, self.image_sizes)
        return "_".join(["piip", self.models.lower(), *map(str, self.image_sizes)])

    @property
    def label(self) -> str:
        """The models in a word."""
        return self.models if isinstance(self.models, str) else families.label(self.models)

    @property
    def title(self) -> str:
        """Name as the published tables print it."""
        return f"{self.label} {'/'.join(map(str, self.image_sizes))}"

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
def named_candidates(models: tuple[str, ...], task: Task) -> tuple[Candidate, ...]:
    """All pyramids of these networks, smallest first, that differ in image sizes.

    Raises:
        ConfigError: For a number of branches that the paper has not, or networks in another order.
    """
    if len(models) not in (2, 3, 4):
        raise ConfigError(f"{families.label(models)}: {len(models)} branches: expected 2, 3 or 4")
    branches = (replace(families.branch(name, 224), segments=None) for name in models)
    alone = (PIIPConfig(branches=(branch,), merging=None) for branch in branches)
    params = [published_count(config, rule="vision tower").total.params for config in alone]
    if params != sorted(params):
        counted = ", ".join(f"{name} {count / 1e6:.0f}M" for name, count in zip(models, params, strict=True))
        raise ConfigError(f"{families.label(models)}: expected the smallest network first: {counted}")
    sizes = CLASSIFIER_SIZES if task == "classification" else IMAGE_SIZES
    return tuple(
        Candidate(models=models, image_sizes=sides, task=task) for sides in itertools.combinations(sizes, len(models))
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
    if isinstance(wanted.models, tuple):
        return None
    same = [known for known in published_mask_rcnn() if known[2] and same_models(known[0].config, wanted.config)]
    return min(same, key=lambda known: abs(math.log(known[1] * 1e9 / wanted.flops)), default=None)
