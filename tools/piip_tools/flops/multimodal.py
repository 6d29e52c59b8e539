"""Both counts of published multimodal models: vision tower by the published rule, tower and projector as executed."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from piip_core import zoo
from piip_core.config import PIIPConfig
from piip_core.merging import TokenMerging
from piip_core.meta import on_meta
from piip_core.pyramid import PIIP

from .executed import executed_count
from .published import Count, published_count

__all__ = ["MultimodalRow", "analyze_multimodal"]


@dataclass(frozen=True, kw_only=True)
class MultimodalRow:
    """One published multimodal model: our counts of its vision side for one image.

    Attributes:
        entry: The model with its printed numbers.
        published_count: Vision tower by the published rule, which leaves the projector out.
        tower: Vision tower as our modules hold and run it.
        projector: The same of the projector.
    """

    entry: zoo.MultimodalEntry
    published_count: Count
    tower: Count
    projector: Count

    @property
    def executed(self) -> Count:
        """Vision tower and projector."""
        return self.tower + self.projector

    @property
    def flops_deviation(self) -> float:
        """The published count over the printed #FLOPs, minus 1."""
        return self.published_count.macs / (self.entry.flops_g * 1e9) - 1


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


def analyze_multimodal(entries: Iterable[zoo.MultimodalEntry] | None = None) -> Iterator[MultimodalRow]:
    """Counts published multimodal models one after the other; without `entries` all of them."""
    known: dict[tuple[PIIPConfig, int | None], Count] = {}
    for entry in zoo.multimodal_entries() if entries is None else entries:
        key = entry.vision, entry.feature_block
        if key not in known:  # language models of several sizes share a tower
            known[key] = _tower_count(entry)
        published = published_count(entry.vision, rule="vision tower").total
        yield MultimodalRow(entry=entry, published_count=published, tower=known[key], projector=_projector_count(entry))


def _tower_count(entry: zoo.MultimodalEntry) -> Count:
    with on_meta():
        tower = _Tower(entry.vision, entry.feature_block)
        image = torch.empty(1, 3, entry.image_size, entry.image_size)
    return executed_count(tower, image).total


def _projector_count(entry: zoo.MultimodalEntry) -> Count:
    """As executed: a map smaller than the grid is resized behind the first linear."""
    config = entry.vision
    dims, strides = config.dims_after(None), config.strides_after(None)
    sides = [branch.image_size // stride for branch, stride in zip(config.branches, strides, strict=True)]
    with on_meta():
        projector = TokenMerging(dims, entry.embed_dim, norm=entry.projector_norm, grid=entry.grid)
        maps = [torch.empty(1, dim, side, side) for dim, side in zip(dims, sides, strict=True)]
    return executed_count(projector, maps).total
