"""Where the time of a forward pass goes."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from tabulate import tabulate
from timm.layers import Attention, Mlp
from torch import nn

from piip_core.branches.beit import RelativeBiasAttention
from piip_core.interaction import DeformableCrossAttention, Injection
from piip_core.merging import BranchMerging, FeaturePyramid

from ..flops.executed import attribute_to_modules
from ..timing import Clock, clock_for, limited_threads, take_turns
from .measuring import autocast_for
from .models import TimedModel

__all__ = ["PARTS", "REST", "format_results", "measure_parts"]

PARTS: Mapping[type[nn.Module], str] = {
    Attention: "self-attention",
    RelativeBiasAttention: "self-attention",
    Mlp: "MLPs",
    DeformableCrossAttention: "deformable attention",
    Injection: "interactions: norms, projections, FFNs",
    BranchMerging: "merging",
    FeaturePyramid: "feature pyramid",
}
REST = "embeddings, norms, residuals of branches"


def measure_parts(
    models: Sequence[TimedModel],
    precisions: Sequence[str],
    *,
    device: str = "cpu",
    batch: int = 1,
    repeats: int = 3,
    threads: int = 1,
    parts: Mapping[type[nn.Module], str] = PARTS,
) -> list[dict[str, Any]]:
    """Medians of the time spent in each kind of module, in forward passes without gradients.

    A GPU is waited for at every border of a module, which costs time that it would not take otherwise. `parts` says
    what the time in modules of a type is called, without that in modules inside that are parts, too. Other time is
    `REST`.
    """
    results = []
    with limited_threads(threads):
        for precision in precisions:
            for timed in models:
                model, image = timed.load(precision, device, batch)
                run = partial(_time_parts, model, image, parts, clock_for(device, threads))
                with timed.context(model), autocast_for(precision, device), torch.no_grad():
                    (runs,) = take_turns([run], repeats)
                seconds = {name: statistics.median(run[name] for run in runs) for name in runs[0]}
                results.append({"model": timed.name, "precision": precision, "seconds": seconds})
    return results


def _time_parts(
    model: nn.Module, image: torch.Tensor, parts: Mapping[type[nn.Module], str], clock: Clock
) -> Counter[str]:
    own: Counter[str] = Counter()
    with attribute_to_modules(model, clock, own):
        model(image)
    part_of: dict[str, str] = {}
    spent: Counter[str] = Counter()
    for name, module in model.named_modules():  # outer ones first
        outer = part_of.get(name.rpartition(".")[0], REST)
        part_of[name] = next((part for kind, part in parts.items() if isinstance(module, kind)), outer)
        spent[part_of[name]] += own[name]
    return spent


def format_results(results: Sequence[Mapping[str, Any]]) -> str:
    """A line per part and a column per model and precision: seconds and share."""
    names = dict.fromkeys(name for result in results for name in result["seconds"])
    columns = []
    for result in results:
        total = sum(result["seconds"].values())
        cells = [result["seconds"].get(name, 0.0) for name in names] + [total]
        columns.append([f"{seconds:.3f} ({seconds / total:.0%})" for seconds in cells])
    header = ["seconds (share)", *(f"{result['model']}\n{result['precision']}" for result in results)]
    lines = zip([*names, "total"], *columns, strict=True)
    return tabulate(lines, header, disable_numparse=True, colalign=("left", *["right"] * len(columns)))
