"""Where the time of a forward pass goes."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from tabulate import tabulate
from timm.layers import Attention, Mlp
from torch import nn
from tqdm import tqdm

from piip_core.branches.beit import RelativeBiasAttention
from piip_core.interaction import DeformableCrossAttention, Injection
from piip_core.merging import BranchMerging, FeaturePyramid

from ..timing import clock_for, limited_threads
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

    A GPU is waited for at every border of a part, which costs time that it would not take otherwise. `parts` says what
    the time in modules of a type is called, without that in modules inside that are parts, too. Other time is `REST`.
    """
    results = []
    with limited_threads(threads):
        for precision in precisions:
            for timed in tqdm(models, desc=f"parts in {precision}", leave=False):
                model, image = timed.load(precision, device, batch)
                run = partial(_time_parts, model, image, parts, clock_for(device, threads))
                with timed.context(model), autocast_for(precision, device), torch.no_grad():
                    _, *runs = [run() for _ in range(1 + repeats)]
                seconds = {name: statistics.median(run[name] for run in runs) for name in runs[0]}
                results.append({"model": timed.name, "precision": precision, "seconds": seconds})
    return results


def _time_parts(
    model: nn.Module, image: torch.Tensor, parts: Mapping[type[nn.Module], str], clock: Callable[[], float]
) -> Counter[str]:
    spent: Counter[str] = Counter()
    running, since = [REST], clock()

    def switch(change: Callable[[], object]) -> None:
        nonlocal since
        now = clock()
        spent[running[-1]] += now - since
        since = now
        change()

    with ExitStack() as stack:
        for module in model.modules():
            name = next((name for kind, name in parts.items() if isinstance(module, kind)), None)
            if name is not None:
                enter = module.register_forward_pre_hook(lambda *_, name=name: switch(lambda: running.append(name)))
                leave = module.register_forward_hook(lambda *_: switch(running.pop))
                stack.callback(enter.remove)
                stack.callback(leave.remove)
        model(image)
        switch(running.pop)
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
