"""Both counts of models as Markdown tables, of published models beside the printed numbers."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache
from operator import attrgetter
from typing import Any

import torch
from tabulate import tabulate
from torch import Tensor, nn

from piip_core import zoo
from piip_core.config import PIIPConfig
from piip_core.merging import TokenMerging
from piip_core.meta import on_meta
from piip_core.pyramid import PIIP

from .executed import ModelReport, analyze_backbone, executed_count
from .published import Count, published_count

MISSING = "-"
_SCORES = {"box_ap": ("box AP", 1), "mask_ap": ("mask AP", 1), "miou": ("mIoU", 2)}  # column and digits
_BENCHMARKS = ("MMBench", "MM-Vet", "TextVQA", "SQA-I", "GQA", "VQAv2", "SEED-I", "POPE", "average")

Cell = Callable[[Any], object]


@dataclass(frozen=True, kw_only=True)
class CountedModel:
    """A published model with our counts of it for one image.

    Attributes:
        entry: What the zoo knows about it.
        published_count: Of the backbone, by the published rule.
        backbone: Executed count of the backbone with what merges its branches; of a multimodal model the vision tower.
        projector: Executed count of a multimodal model's projector, which the published count leaves out.
    """

    entry: Any
    published_count: Count
    backbone: Count
    projector: Count = field(default_factory=Count)

    @property
    def executed(self) -> Count:
        """Backbone and projector."""
        return self.backbone + self.projector


def analyze_zoo(entries: Iterable[zoo.ZooEntry | zoo.ClassificationEntry] | None = None) -> Iterator[CountedModel]:
    """Counts published dense models or classifiers one after the other; without `entries` all dense ones."""
    count = cache(analyze_backbone)  # several detectors share a backbone
    for entry in zoo.entries() if entries is None else entries:
        found = count(entry.config)
        published = Count(found.params_published_count, found.flops_published_count)
        yield CountedModel(entry=entry, published_count=published, backbone=Count(found.params, found.flops))


def analyze_multimodal(entries: Iterable[zoo.MultimodalEntry] | None = None) -> Iterator[CountedModel]:
    """Counts published multimodal models one after the other; without `entries` all of them."""
    count = cache(_count_tower)  # language models of several sizes share a tower
    for entry in zoo.multimodal_entries() if entries is None else entries:
        yield CountedModel(
            entry=entry,
            published_count=published_count(entry.vision, rule="vision tower").total,
            backbone=count(entry.vision, entry.feature_block, entry.image_size),
            projector=_count_projector(entry),
        )


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


def model_table(report: ModelReport) -> str:
    """One line per part of a model and their sum, in millions of parameters and GMACs."""
    height, width = report.input_size
    columns = [
        ("module", attrgetter("name")),
        ("params (M)", _scaled("params", 1e6)),
        (f"executed GMACs, {height} x {width}", _scaled("flops", 1e9)),
        ("published count: params (M)", _scaled("params_published_count", 1e6)),
        ("published count: GMACs", _scaled("flops_published_count", 1e9)),
    ]
    return _table(columns, [*report.modules, dataclasses.replace(report, name="total")])


def published_tables(rows: Iterable[CountedModel], link: Callable[[str], str]) -> str:
    """The published dense models for a README: a heading, a table and its notes for each published table.

    Args:
        rows: The models, those of a table one after the other.
        link: Makes the last cell, a link, of the model's config file.
    """
    parts = []
    for title, group in itertools.groupby(rows, key=lambda row: row.entry.table):
        group = list(group)
        scores = [name for name in _SCORES if any(_score(name)(row) != MISSING for row in group)]
        columns = [
            ("model", attrgetter("entry.title")),
            ("resolution", attrgetter("entry.resolution")),
            *((_SCORES[name][0], _score(name)) for name in scores),
            ("#Param", _printed("params_m", "M")),
            ("#FLOPs", _printed("flops_g", "G")),
            ("our #Param count", _scaled("published_count.params", 1e6, "M")),
            ("our #FLOPs count", _scaled("published_count.macs", 1e9, "G")),
            ("our params", _scaled("executed.params", 1e6, "M")),
            ("our executed FLOPs", _scaled("executed.macs", 1e9, "G")),
            ("config", lambda row: link(row.entry.config_file)),
        ]
        parts += [f"### {title}", _table_with_notes(columns, group)]
    return "\n\n".join(parts)


def classification_table(rows: Iterable[CountedModel], link: Callable[[str], str]) -> str:
    """The published classifiers for a README: a table and its notes; `link` as for `published_tables`."""
    columns = [
        ("model", attrgetter("entry.title")),
        ("resolution", attrgetter("entry.resolution")),
        ("top-1", _scaled("entry.published.top1")),
        ("#Param", _scaled("entry.published.params_m", suffix="M", digits=0)),
        ("#FLOPs", _scaled("entry.published.flops_g", suffix="G")),
        ("our #Param count", _scaled("published_count.params", 1e6, "M")),
        ("our #FLOPs count", _scaled("published_count.macs", 1e9, "G")),
        ("our executed FLOPs", _scaled("executed.macs", 1e9, "G")),
        ("name", lambda row: f"`{row.entry.name}`"),
        ("config", lambda row: link(row.entry.config_file)),
    ]
    return _table_with_notes(columns, list(rows))


def beyond_table(rows: Iterable[CountedModel], link: Callable[[str], str]) -> str:
    """The models of `zoo.beyond` for a README: counts, and no scores; `link` as for `published_tables`."""
    heads = {"mask_rcnn": "Mask R-CNN", "cascade_mask_rcnn": "Cascade R-CNN", "dino": "DINO", "upernet": "UperNet"}
    columns = [
        ("model", attrgetter("entry.title")),
        ("resolution", attrgetter("entry.resolution")),
        ("head", lambda row: heads.get(getattr(row.entry, "head", ""), "classifier")),
        ("our #Param count", _scaled("published_count.params", 1e6, "M")),
        ("our #FLOPs count", _scaled("published_count.macs", 1e9, "G")),
        ("our params", _scaled("executed.params", 1e6, "M")),
        ("our executed FLOPs", _scaled("executed.macs", 1e9, "G")),
        ("config", lambda row: link(row.entry.config_file)),
    ]
    return _table_with_notes(columns, list(rows))


def multimodal_table(rows: Iterable[CountedModel]) -> str:
    """The published multimodal models for a README: a table and its notes."""
    columns = [
        ("model", attrgetter("entry.title")),
        ("resolution", attrgetter("entry.resolution")),
        ("image tokens", attrgetter("entry.image_seq_length")),
        ("language model", lambda row: row.entry.language_model.rpartition("/")[2]),
        ("data", attrgetter("entry.training_data")),
        *(
            (title, lambda row, index=index: f"{dataclasses.astuple(row.entry.scores)[index]:.1f}")
            for index, title in enumerate(_BENCHMARKS)
        ),
        ("#FLOPs", _scaled("entry.flops_g", suffix="G", digits=0)),
        ("our #FLOPs count", _scaled("published_count.macs", 1e9, "G")),
        ("our executed FLOPs", _scaled("executed.macs", 1e9, "G")),
        ("name", lambda row: f"`{row.entry.name}`"),
    ]
    return _table_with_notes(columns, list(rows))


def ablation_table(settings: Iterable[zoo.ZooEntry]) -> str:
    """Settings of one of the paper's ablations or figures: printed scores and costs, our counts, and notes."""
    rows = [
        CountedModel(
            entry=setting,
            published_count=published_count(setting.config).total,
            backbone=published_count(setting.config, rule="merging").total,
        )
        for setting in settings
    ]
    columns = [
        ("name", attrgetter("entry.name")),
        ("setting", attrgetter("entry.title")),
        ("box AP", lambda row: _number(paper_number(row.entry, "box_ap"), 1, "", 1)),
        ("mask AP", lambda row: _number(paper_number(row.entry, "mask_ap"), 1, "", 1)),
        ("#Param", _printed("params_m", "M")),
        ("ours", _scaled("published_count.params", 1e6, "M")),
        ("dev.", _deviation("params_m", "published_count.params", 1e6)),
        ("#FLOPs", _printed("flops_g", "G")),
        ("ours", _scaled("published_count.macs", 1e9, "G")),
        ("dev.", _deviation("flops_g", "published_count.macs", 1e9)),
        ("params with merging", _scaled("backbone.params", 1e6, "M")),
        ("FLOPs with merging", _scaled("backbone.macs", 1e9, "G")),
    ]
    notes = "".join(f"\n- {row.entry.name}: {row.entry.note}." for row in rows if row.entry.note)
    return _table(columns, rows, left=2) + (f"\n{notes}" if notes else "")


def paper_number(entry: zoo.ZooEntry, name: str) -> float | None:
    """A number as the paper prints it, which is that of the public repository unless the zoo has another."""
    return getattr(entry.paper, name) or getattr(entry.published, name)


def _table(columns: Sequence[tuple[str, Cell]], rows: Iterable[object], *, left: int = 1) -> str:
    cells = [[cell(row) for _, cell in columns] for row in rows]
    align = ["left"] * left + ["right"] * (len(columns) - left)
    return tabulate(cells, [title for title, _ in columns], tablefmt="github", colalign=align, disable_numparse=True)


def _table_with_notes(columns: Sequence[tuple[str, Cell]], rows: Sequence[CountedModel]) -> str:
    """A table with marks in the first column, and after it the notes that they stand for."""
    notes = dict.fromkeys(row.entry.note for row in rows if row.entry.note)
    marks = {note: f"[{n}]" for n, note in enumerate(notes, 1)}
    (title, name), *others = columns
    table = _table([(title, lambda row: f"{name(row)} {marks.get(row.entry.note, '')}".strip()), *others], rows)
    return "\n\n".join([table, *(["\n".join(f"{mark} {note}.  " for note, mark in marks.items())] if marks else [])])


def _scaled(name: str, unit: float = 1, suffix: str = "", *, digits: int = 1) -> Cell:
    return lambda row: _number(attrgetter(name)(row), unit, suffix, digits)


def _number(number: float | None, unit: float, suffix: str, digits: int) -> str:
    return MISSING if number is None else f"{number / unit:.{digits}f}{suffix}"


def _printed(name: str, suffix: str) -> Cell:
    """A number of the public repository, or the paper's where that prints none."""
    return lambda row: _number(_printed_number(row, name), 1, suffix, 0)


def _printed_number(row: CountedModel, name: str) -> float | None:
    return getattr(row.entry.published, name) or getattr(row.entry.paper, name)


def _deviation(printed: str, counted: str, unit: float) -> Cell:
    def cell(row: CountedModel) -> str:
        number = _printed_number(row, printed)
        return MISSING if number is None else f"{attrgetter(counted)(row) / unit / number - 1:+.2%}"

    return cell


def _score(name: str) -> Cell:
    """A published score, with the paper's in brackets where it prints another."""
    digits = _SCORES[name][1]

    def cell(row: CountedModel) -> str:
        repository, paper = getattr(row.entry.published, name), getattr(row.entry.paper, name)
        texts = [] if repository is None else [f"{repository:.{digits}f}"]
        texts += [] if paper is None else [f"({paper:.{digits}f})"]
        return " ".join(texts) or MISSING

    return cell
