"""Both counts of the published models, beside the printed numbers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor, nn

from piip_core import zoo
from piip_core.config import PIIPConfig
from piip_core.merging import TokenMerging
from piip_core.meta import on_meta
from piip_core.pyramid import PIIP

from .executed import executed_count
from .published import Count, published_count
from .report import ModuleRow, analyze_backbone

__all__ = [
    "ClassificationRow",
    "MultimodalRow",
    "ZooRow",
    "analyze_classifiers",
    "analyze_multimodal",
    "analyze_zoo",
]


@dataclass(frozen=True, kw_only=True)
class ZooRow(ModuleRow):
    """A published dense model: our counts beside the printed numbers, all absolute; None where nothing was printed.

    `params` and `flops` are those of the backbone with merging and feature pyramid on one square image of the last
    branch's size. Printed are those of the repository, or the paper's where it prints none; deviations are the
    published count over them, minus 1. Scores of the paper are there where it prints others.
    """

    title: str
    table: str
    note: str
    resolution: str
    params_printed: int | None
    flops_printed: int | None
    params_deviation: float | None
    flops_deviation: float | None
    box_ap: float | None
    mask_ap: float | None
    miou: float | None
    box_ap_paper: float | None
    mask_ap_paper: float | None
    miou_paper: float | None


@dataclass(frozen=True, kw_only=True)
class ClassificationRow:
    """A published classifier with its printed numbers, and our counts of it for one image."""

    entry: zoo.ClassificationEntry
    published_count: Count
    executed: Count


@dataclass(frozen=True, kw_only=True)
class MultimodalRow:
    """A published multimodal model with its printed numbers, and our counts of its vision side for one image.

    The published count leaves the projector out; `tower` and `projector` are executed counts.
    """

    entry: zoo.MultimodalEntry
    published_count: Count
    tower: Count
    projector: Count

    @property
    def executed(self) -> Count:
        """Vision tower and projector."""
        return self.tower + self.projector


def analyze_zoo(entries: Iterable[zoo.ZooEntry] | None = None) -> Iterator[ZooRow]:
    """Counts published models one after the other; without `entries` all of them."""
    count = cache(analyze_backbone)  # several detectors share a backbone
    for entry in zoo.entries() if entries is None else entries:
        counted, published, paper = count(entry.config), entry.published, entry.paper
        params, flops = published.params_m or paper.params_m, published.flops_g or paper.flops_g
        yield ZooRow(
            **{name: getattr(entry, name) for name in ("name", "title", "table", "note", "resolution")},
            params=counted.params,
            flops=counted.flops,
            params_published_count=counted.params_published_count,
            flops_published_count=counted.flops_published_count,
            params_printed=params and round(params * 1e6),
            flops_printed=flops and round(flops * 1e9),
            params_deviation=params and counted.params_published_count / (params * 1e6) - 1,
            flops_deviation=flops and counted.flops_published_count / (flops * 1e9) - 1,
            **{name: getattr(published, name) for name in ("box_ap", "mask_ap", "miou")},
            **{f"{name}_paper": getattr(paper, name) for name in ("box_ap", "mask_ap", "miou")},
        )


def analyze_classifiers(entries: Iterable[zoo.ClassificationEntry] | None = None) -> Iterator[ClassificationRow]:
    """Counts published classifiers one after the other; without `entries` all of them."""
    for entry in zoo.classification_entries() if entries is None else entries:
        counted = analyze_backbone(entry.config)
        published = published_count(entry.config).total
        yield ClassificationRow(entry=entry, published_count=published, executed=Count(counted.params, counted.flops))


def analyze_multimodal(entries: Iterable[zoo.MultimodalEntry] | None = None) -> Iterator[MultimodalRow]:
    """Counts published multimodal models one after the other; without `entries` all of them."""
    count = cache(_count_tower)  # language models of several sizes share a tower
    for entry in zoo.multimodal_entries() if entries is None else entries:
        published = published_count(entry.vision, rule="vision tower").total
        tower = count(entry.vision, entry.feature_block, entry.image_size)
        yield MultimodalRow(entry=entry, published_count=published, tower=tower, projector=_count_projector(entry))


class _Tower(nn.Module):
    """What makes the features: of a single branch only the blocks up to `feature_block`."""

    def __init__(self, config: PIIPConfig, feature_block: int | None) -> None:
        super().__init__()
        self.pyramid = PIIP(config)
        self.feature_block = feature_block

    def forward(self, image: Tensor) -> list[Tensor]:
        if self.feature_block is None:
            return self.pyramid(image)
        return self.pyramid.forward_blocks(image, [self.feature_block])


def _count_tower(config: PIIPConfig, feature_block: int | None, size: int) -> Count:
    with on_meta():
        tower = _Tower(config, feature_block)
        image = torch.empty(1, 3, size, size)
    return executed_count(tower, image).total


def _count_projector(entry: zoo.MultimodalEntry) -> Count:
    """As executed: a map smaller than the grid is resized after the first linear."""
    config = entry.vision
    dims, strides = config.dims_after(None), config.strides_after(None)
    sides = [branch.image_size // stride for branch, stride in zip(config.branches, strides, strict=True)]
    with on_meta():
        projector = TokenMerging(dims, entry.embed_dim, norm=entry.projector_norm, grid=entry.grid)
        maps = [torch.empty(1, dim, side, side) for dim, side in zip(dims, sides, strict=True)]
    return executed_count(projector, maps).total
