"""Median times and peak memory of backbones that take turns."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from piip_core.export import tensors_in

from ..reporting import draw_bars, format_table, new_figure
from ..timing import clock_for, limited_threads, peak_memory, take_turns, time_call
from .models import TimedModel

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["PRECISIONS", "autocast_for", "draw_results", "format_results", "measure_backbones"]

PRECISIONS = ("fp32", "bf16", "amp")
"""Float32; weights and images in bfloat16; float32 weights under bfloat16 autocast."""


def measure_backbones(
    models: Sequence[TimedModel],
    precisions: Sequence[str],
    *,
    training: bool = False,
    device: str = "cpu",
    batch: int = 1,
    repeats: int = 5,
    threads: int = 1,
) -> list[dict[str, Any]]:
    """Times forward passes without gradients, or training steps: forward, backward from given gradients, AdamW.

    There is no loss: its time would be that of the sizes of the maps.

    Args:
        models: The last one is the baseline that the ratios are to.
        precisions: Out of `PRECISIONS`.
        training: Times training steps.
        device: "cpu" or "cuda".
        batch: Images.
        repeats: The medians are over so many.
        threads: CPU threads.

    Returns:
        A result per precision and model: the seconds of every round, their median, the median over the rounds of the
        "ratio" to the baseline, "peak" bytes as `peak_memory` counts them (those of training hold activations and
        gradients), and their ratio.
    """
    with limited_threads(threads):
        return [
            result
            for precision in precisions
            for result in _measure_precision(models, precision, training, device, batch, repeats, threads)
        ]


def _measure_precision(
    models: Sequence[TimedModel],
    precision: str,
    training: bool,
    device: str,
    batch: int,
    repeats: int,
    threads: int,
) -> list[dict[str, Any]]:
    clock = clock_for(device, threads)
    loaded = [timed.load(precision, device, batch) for timed in models]
    works = [
        _within(timed, model, (_training_step if training else _forward)(model, image), precision, device)
        for timed, (model, image) in zip(models, loaded, strict=True)
    ]
    seconds = take_turns([lambda work=work: time_call(work, clock) for work in works], repeats)
    peaks = [peak_memory(work, model, device) for work, (model, _) in zip(works, loaded, strict=True)]
    return [
        {
            "model": timed.name,
            "image_size": timed.image_size,
            "precision": precision,
            "batch": batch,
            "seconds": own,
            "median": statistics.median(own),
            "ratio": statistics.median(time / baseline for time, baseline in zip(own, seconds[-1], strict=True)),
            "peak": peak,
            "peak_ratio": peak / peaks[-1],
        }
        for timed, own, peak in zip(models, seconds, peaks, strict=True)
    ]


def _forward(model: nn.Module, image: Tensor) -> Callable[[], object]:
    return torch.no_grad()(lambda: model(image))


def _training_step(model: nn.Module, image: Tensor) -> Callable[[], object]:
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6)

    def step() -> None:
        outputs = tensors_in(model(image))
        torch.autograd.backward(outputs, [torch.ones_like(output) for output in outputs])
        optimizer.step()
        optimizer.zero_grad()

    return step


def _within(
    timed: TimedModel, model: nn.Module, work: Callable[[], object], precision: str, device: str
) -> Callable[[], object]:
    def run() -> None:
        with timed.context(model), autocast_for(precision, device):
            work()

    return run


def autocast_for(precision: str, device: str) -> AbstractContextManager[object]:
    """Autocast for "amp"."""
    return torch.autocast(torch.device(device).type, torch.bfloat16) if precision == "amp" else nullcontext()


def format_results(results: Sequence[Mapping[str, Any]]) -> str:
    """The results as a table."""
    columns = {"model": "{model}", "image": "{image_size:d}", "precision": "{precision}", "median s": "{median:.3f}"}
    columns |= {"time ratio": "{ratio:.2f}", "peak bytes": "{peak:,}", "peak ratio": "{peak_ratio:.2f}"}
    return format_table(results, columns)


def draw_results(results: Sequence[Mapping[str, Any]], title: str) -> Figure:
    """Times and peak memory as bars, for every precision beside each other, with the ratios to the baseline."""
    precisions = list(dict.fromkeys(result["precision"] for result in results))
    figure = new_figure((11, 1.0 + len(precisions) * 0.7 + 0.35 * len(results)), title)
    grid = figure.subplots(len(precisions), 2, squeeze=False, sharey="row")
    for row, precision in zip(grid, precisions, strict=True):
        shown = [result for result in results if result["precision"] == precision]
        for axes, key, ratio, unit, label in (
            (row[0], "median", "ratio", 1, "seconds"),
            (row[1], "peak", "peak_ratio", 1e9, "peak memory, GB"),
        ):
            values = [result[key] / unit for result in shown]
            labels = [f"{value:.2f}  ({result[ratio]:.2f}x)" for value, result in zip(values, shown, strict=True)]
            names = [result["model"] for result in shown]
            draw_bars(axes, names, {label: values}, labels={label: labels}, xlabel=f"{label}, {precision}")
    return figure
