"""Both counts side by side, for one model and for all published models."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import torch
from torch import nn

from piip_core import zoo
from piip_core.classifier import PIIPClassifier, build_model
from piip_core.config import ClassifierConfig, PIIPConfig
from piip_core.errors import ConfigError
from piip_core.meta import on_meta
from piip_core.pyramid import PIIP

from .executed import ModuleCounts, executed_count
from .published import Count, PublishedCount, published_count

__all__ = ["ModelReport", "ModuleRow", "ZooRow", "analyze_backbone", "analyze_model", "analyze_zoo", "padded_size"]


@dataclass(frozen=True, kw_only=True)
class ModuleRow:
    """One part of a model. None where a part does not exist by that rule, or was not run.

    Attributes:
        params: Parameters it holds.
        flops: Multiply-accumulates it executes.
        params_published_count: Parameters by the published rule.
        flops_published_count: Multiply-accumulates by the published rule.
    """

    name: str
    params: int | None = None
    flops: int | None = None
    params_published_count: int | None = None
    flops_published_count: int | None = None


@dataclass(frozen=True, kw_only=True)
class ModelReport(ModuleRow):
    """Counts of a model with one row per part.

    Attributes:
        input_size: Height and width of the image of the executed count. The published count is always of one square
            image of the last branch's size.
        modules: The parts; they add up to the model.
    """

    input_size: tuple[int, int]
    modules: tuple[ModuleRow, ...] = field(repr=False)


@dataclass(frozen=True, kw_only=True)
class ZooRow(ModuleRow):
    """One published model: our counts beside the printed numbers, all absolute; None where nothing was printed.

    `params` and `flops` are those of the backbone with merging and feature pyramid on one square image of the last
    branch's size.

    Attributes:
        title: Name in the published table.
        table: The published table.
        note: What to know about the printed numbers.
        params_printed: Published #Param; the paper's where the repository prints none.
        flops_printed: Published #FLOPs; the paper's where the repository prints none.
        params_deviation: `params_published_count` over `params_printed`, minus 1.
        flops_deviation: `flops_published_count` over `flops_printed`, minus 1.
        box_ap: Published box AP; the paper's in `box_ap_paper` where it prints another.
        mask_ap: Published mask AP; the paper's in `mask_ap_paper` where it prints another.
        miou: Published mIoU; the paper's in `miou_paper` where it prints another.
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


def padded_size(height: int, width: int, divisor: int) -> tuple[int, int]:
    """Rounds both sides up to multiples of `divisor`."""
    return -(-height // divisor) * divisor, -(-width // divisor) * divisor


def analyze_backbone(config: PIIPConfig | ClassifierConfig, input_size: tuple[int, int] | None = None) -> ModelReport:
    """Counts a backbone or classifier on the meta device.

    Args:
        config: The model; a PIIPConfig with `merging=None` is just branches and interactions.
        input_size: Height and width of the image, padding included; None for a square of the last branch's size.
    """
    with on_meta():
        model = build_model(config)
    return analyze_model(model, input_size)


def analyze_model(model: nn.Module, input_size: tuple[int, int] | None = None, *, backbone: str = "") -> ModelReport:
    """Counts a model with one PIIP inside: parameters of all of it, multiply-accumulates of its backbone.

    Args:
        model: Of any device; on the meta device nothing is computed or stored.
        input_size: Height and width of the image, padding included; None for a square of the last branch's size.
        backbone: Name of the submodule that takes the image and is run; "" for the model itself.

    Raises:
        ConfigError: If the model does not hold exactly one PIIP.
    """
    pyramids = [(name, module) for name, module in model.named_modules() if isinstance(module, PIIP)]
    if len(pyramids) != 1:
        raise ConfigError(f"{type(model).__name__} holds {len(pyramids)} PIIP modules: expected one to analyze")
    name, pyramid = pyramids[0]
    side = pyramid.config.branches[pyramid.config.largest_image - 1].image_size
    height, width = input_size or (side, side)
    image = torch.empty(1, 3, height, width, device=next(model.parameters()).device)
    counts = executed_count(model, image, run=backbone)
    holder = model.get_submodule(name.rpartition(".")[0])
    config = holder.config if isinstance(holder, PIIPClassifier) else pyramid.config
    published = _published(config)
    return ModelReport(
        name=type(model).__name__,
        params=counts.total.params,
        flops=counts.total.macs,
        params_published_count=None if published is None else published.total.params,
        flops_published_count=None if published is None else published.total.macs,
        input_size=(height, width),
        modules=tuple(_rows(model, name, published, counts, backbone)),
    )


def _rows(
    model: nn.Module, pyramid: str, published: PublishedCount | None, counts: ModuleCounts, backbone: str
) -> Iterator[ModuleRow]:
    """Parts of the pyramid, then its siblings (merging, feature pyramid), rest of the backbone, rest of the model."""
    for i in range(len(model.get_submodule(pyramid).branches)):
        branch = None if published is None else published.branches[i]
        yield _row(f"branch{i + 1}", counts.below(_join(pyramid, f"branches.{i}")), branch)
    interactions = None if published is None else published.interactions
    yield _row("interactions", counts.below(_join(pyramid, "interactions")), interactions)
    # The published count puts a classifier on dense models, too
    classifies = isinstance(model.get_submodule(pyramid.rpartition(".")[0]), PIIPClassifier)
    if published is not None and not classifies:
        yield _row("head (published count only)", None, published.head)
    inner = pyramid
    while inner:  # outwards from the pyramid, every sibling on the way
        outer = inner.rpartition(".")[0]
        for child, module in model.get_submodule(outer).named_children():
            name = _join(outer, child)
            if name != inner and any(True for _ in module.parameters()):
                head = published.head if classifies and published is not None else None
                yield _row(name, counts.below(name), head, was_run=_is_inside(name, backbone))
        inner = outer


def _published(config: PIIPConfig | ClassifierConfig) -> PublishedCount | None:
    """The published count; None for networks that no published model has."""
    try:
        return published_count(config)
    except NotImplementedError:
        return None


def _row(name: str, executed: Count | None, published: Count | None, *, was_run: bool = True) -> ModuleRow:
    return ModuleRow(
        name=name,
        params=None if executed is None else executed.params,
        flops=None if executed is None or not was_run else executed.macs,
        params_published_count=None if published is None else published.params,
        flops_published_count=None if published is None else published.macs,
    )


def _join(outer: str, inner: str) -> str:
    return f"{outer}.{inner}" if outer else inner


def _is_inside(name: str, outer: str) -> bool:
    return not outer or name == outer or name.startswith(f"{outer}.")


def analyze_zoo(entries: Iterable[zoo.ZooEntry] | None = None) -> Iterator[ZooRow]:
    """Counts published models one after the other; without `entries` all of them."""
    known: dict[PIIPConfig, ModelReport] = {}
    for entry in zoo.entries() if entries is None else entries:
        if entry.config not in known:  # several detectors share a backbone
            known[entry.config] = analyze_backbone(entry.config)
        counted = known[entry.config]
        printed_params = _absolute(entry.published.params_m or entry.paper.params_m, 1e6)
        printed_flops = _absolute(entry.published.flops_g or entry.paper.flops_g, 1e9)
        yield ZooRow(
            name=entry.name,
            title=entry.title,
            table=entry.table,
            note=entry.note,
            resolution=entry.resolution,
            params=counted.params,
            flops=counted.flops,
            params_published_count=counted.params_published_count,
            flops_published_count=counted.flops_published_count,
            params_printed=printed_params,
            flops_printed=printed_flops,
            params_deviation=_deviation(counted.params_published_count, printed_params),
            flops_deviation=_deviation(counted.flops_published_count, printed_flops),
            box_ap=entry.published.box_ap,
            mask_ap=entry.published.mask_ap,
            miou=entry.published.miou,
            box_ap_paper=entry.paper.box_ap,
            mask_ap_paper=entry.paper.mask_ap,
            miou_paper=entry.paper.miou,
        )


def _absolute(number: float | None, unit: float) -> int | None:
    return None if number is None else round(number * unit)


def _deviation(counted: int, printed: int | None) -> float | None:
    return None if printed is None else counted / printed - 1
