"""Clocks, turns and peak memory of the benchmarks, and their results as rows of a table."""

from __future__ import annotations

import argparse
import math
import statistics
import time
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import nn
from tqdm import tqdm

from piip_core.errors import UserError, check

from .memory.dry_run import AliveStorages

if TYPE_CHECKING:
    from matplotlib.figure import Figure

T = TypeVar("T")
K = TypeVar("K", bound=Hashable)
Clock = Callable[[], float]


def clock_for(device: torch.device | str, threads: int) -> Clock:
    """A clock in seconds: CPU time on one thread, which other load on the machine disturbs least; wall time on more.

    A GPU is waited for at every reading.
    """
    if torch.device(device).type != "cuda":
        return time.process_time if threads == 1 else time.perf_counter

    def now() -> float:
        torch.cuda.synchronize(device)
        return time.perf_counter()

    return now


def device_argument(text: str) -> str:
    """A device on the command line, for `argparse`: cpu, cuda or cuda:N, if it is there."""
    try:
        device = torch.device(text)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise argparse.ArgumentTypeError(f"{text}: expected cpu, cuda or cuda:N")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise argparse.ArgumentTypeError(f"{text}: {torch.cuda.device_count()} CUDA devices are visible")
    return text


def describe_machine(device: str, threads: int) -> str:
    """What is measured on, in words."""
    return f"{threads} CPU thread(s)" if torch.device(device).type == "cpu" else torch.cuda.get_device_name(device)


def take_turns(works: Mapping[K, Callable[[], T]], repeats: int) -> dict[K, list[T]]:
    """What each work returns in each of `repeats` rounds, after one round that does not count."""
    rounds = tqdm(range(1 + repeats), desc="benchmark", leave=False)
    results = [{key: work() for key, work in works.items()} for _ in rounds]
    return {key: [result[key] for result in results[1:]] for key in works}


def time_in_turns(works: Mapping[K, Callable[[], object]], repeats: int, clock: Clock) -> dict[K, list[float]]:
    """Seconds of each work in each of `repeats` rounds, after one round that does not count."""

    def timed(work: Callable[[], object]) -> float:
        start = clock()
        work()
        return clock() - start

    return take_turns({key: lambda work=work: timed(work) for key, work in works.items()}, repeats)


def kernel_seconds(work: Callable[[], object], calls: int = 10) -> float:
    """Seconds of a GPU's kernels in one call, without those in which it waits for the host.

    Raises:
        UserError: If the profiler saw no kernel.
    """
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as found:
        for _ in range(calls):
            work()
        torch.cuda.synchronize()
    events = [event for event in found.key_averages() if event.device_type == torch.autograd.DeviceType.CUDA]
    microseconds = sum(event.self_device_time_total for event in events)
    check(microseconds > 0, "microseconds of kernels", microseconds, "a profiler that may watch the GPU (CUPTI)")
    return 1e-6 * microseconds / calls


def peak_memory(call: Callable[[], object], model: nn.Module, device: torch.device | str) -> int:
    """The most bytes of tensors at one time that a call makes, so beside parameters, buffers and optimizer state.

    On a GPU as PyTorch's allocator counts them; on a CPU without what kernels allocate for themselves.
    """
    if torch.device(device).type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        held = torch.cuda.memory_allocated(device)
        call()
        return torch.cuda.max_memory_allocated(device) - held
    with AliveStorages(model) as tracker:
        call()
    return tracker.peak


@contextmanager
def limited_threads(threads: int) -> Iterator[None]:
    """PyTorch computes on so many CPU threads inside."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def compare(what: str, unit: str, values: Mapping[str, Sequence[float]], baseline: str) -> dict[str, Any]:
    """A row of results: "medians" of each name's values, and its "ratios" to the baseline in the same rounds."""
    ratios = {
        name: statistics.median(value / other for value, other in zip(own, values[baseline], strict=True))
        for name, own in values.items()
    }
    medians = {name: statistics.median(own) for name, own in values.items()}
    return {"what": what, "unit": unit, "baseline": baseline, "medians": medians, "ratios": ratios}


def format_rows(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows of `compare` as a table: the medians by name, with the ratios to the baseline in brackets."""
    from tabulate import tabulate  # the GPU check does without

    names = _names(rows)
    lines = [[f"{row['what']}, {row['unit']}", *(_cell(row, name) for name in names)] for row in rows]
    align = ["left", *["right"] * len(names)]
    return tabulate(lines, ["", *names], tablefmt="github", disable_numparse=True, colalign=align)


def _names(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    return list(dict.fromkeys(name for row in rows for name in row["medians"]))


def _cell(row: Mapping[str, Any], name: str) -> str:
    if name not in row["medians"]:
        return ""
    text = f"{row['medians'][name]:.4g}"
    return text if name == row["baseline"] else f"{text} ({row['ratios'][name]:.3g})"


def draw_rows(rows: Sequence[Mapping[str, Any]], title: str) -> Figure:
    """The ratios of rows of `compare` as bars.

    Raises:
        UserError: Without matplotlib.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UserError(f"A chart needs matplotlib ({error}): pip install matplotlib") from error
    baselines = list(dict.fromkeys(row["baseline"] for row in rows))
    shown = [name for name in _names(rows) if name not in baselines]
    height = 0.8 / max(len(shown), 1)
    figure = Figure(figsize=(11, 1.5 + 0.25 * len(rows) * max(len(shown), 2)), layout="constrained")
    figure.suptitle(title)
    axes = figure.add_subplot()
    for index, name in enumerate(shown):
        ratios = [row["ratios"].get(name, math.nan) for row in rows]
        places = [place + (index - (len(shown) - 1) / 2) * height for place in range(len(rows))]
        bars = axes.barh(places, ratios, height, label=name)
        axes.bar_label(bars, ["" if math.isnan(ratio) else f"{ratio:.3g}" for ratio in ratios], padding=3, fontsize=8)
    axes.axvline(1, color="0.5", linewidth=0.8)
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.set_yticks(range(len(rows)), [row["what"] for row in rows])
    axes.set_xlabel(f"ratio to {', '.join(baselines)}")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(loc="best")
    return figure
