"""What candidates really take on this machine: one forward pass of each, in a process of its own."""

from __future__ import annotations

import multiprocessing
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from piip_core.errors import ConfigError
from piip_core.pyramid import DensePIIP

from ..flops import published_count
from .budget import Budget
from .candidates import Candidate
from .proposals import Proposal, allowed, rank

_FORWARDS, _ENOUGH_SECONDS = 5, 4.0  # forward passes that are timed, fewer if they take this long
_CAUTION = 0.95  # part of the budget that the next candidate is chosen for
_LARGEST_STEP = 8  # how many times the growing cost of the last one the next candidate may have


@dataclass(frozen=True, kw_only=True)
class Machine:
    """How to run the candidates: on "cpu" or a CUDA device, in "float32" or through autocast in "bfloat16"."""

    device: str = "cpu"
    dtype: Literal["float32", "bfloat16"] = "float32"
    threads: int = 1

    def __post_init__(self) -> None:
        kind = torch.device(self.device).type
        if kind not in ("cpu", "cuda"):
            raise ConfigError(f"device {self.device!r}: expected cpu or cuda")
        if kind == "cuda" and not torch.cuda.is_available():
            raise ConfigError(f"device {self.device!r}: no CUDA device is visible")
        if kind == "cpu" and not _HIGH_WATER_RESET.exists():
            raise ConfigError(f"device {self.device!r}: peak memory is read from /proc/self, which is on Linux only")

    @property
    def description(self) -> str:
        """Processor, dtype, threads and version of PyTorch in one line."""
        if torch.device(self.device).type == "cuda":
            processor, threads = torch.cuda.get_device_name(self.device), ""
        else:
            processor, threads = _cpu_name(), f", {self.threads} of {os.cpu_count()} CPU threads"
        return f"{processor} ({self.device}), {self.dtype}{threads}, PyTorch {torch.__version__}"


@dataclass(frozen=True, kw_only=True)
class Measured:
    """Median time and highest memory of forward passes of backbone and feature pyramid, without a detector's heads.

    Memory holds weights and activations: on a CPU it is the growth of the process, on a GPU what PyTorch allocated.
    """

    seconds: float
    peak_bytes: int

    def values(self) -> dict[Literal["latency", "memory"], float]:
        """Both numbers by the kind of budget that limits them."""
        return {"latency": self.seconds, "memory": float(self.peak_bytes)}

    def of(self, budget: Budget) -> float:
        """The number that a measured budget limits."""
        return self.values()[budget.kind]


@dataclass(frozen=True, kw_only=True)
class Search:
    """Measured candidates within the budget, best first, and all that were measured: None is out of memory.

    `flops_limit` is the budget in multiply-accumulates that the measurements amount to; it decides the baseline.
    """

    proposals: list[Proposal]
    measured: dict[Candidate, Measured | None]
    flops_limit: float


def measure(candidate: Candidate, machine: Machine) -> Measured | None:
    """Runs a candidate with random weights in a new process; None if there is not enough memory."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(max_workers=1, mp_context=context) as pool:
        try:
            return pool.submit(_run, candidate, machine).result()
        except (BrokenProcessPool, torch.OutOfMemoryError, MemoryError):
            return None


def search(
    branches: int,
    budget: Budget,
    run: Callable[[Candidate], Measured | None],
    *,
    params_limit: float | None = None,
    models: str | None = None,
    runs: int = 6,
) -> Search:
    """Finds pyramids within a measured budget, with few measurements.

    The cheapest candidate is measured first. From each measurement follows about what the others take; the best
    proposal that should then fit, and was not measured yet, comes next, up to `runs` measurements by `run`. The other
    arguments are those of `propose`.

    Raises:
        ConfigError: If not even the cheapest candidate fits.
    """
    pool = allowed(branches, models=models, params_limit=params_limit)
    costs = {c: _expected(c, budget) for c in pool}
    newest = cheapest = min(pool, key=lambda c: sum(costs[c]))
    measured, rate = {cheapest: run(cheapest)}, 0.0
    taken = measured[cheapest]
    if taken is None or taken.of(budget) > budget.limit:
        reason = "runs out of memory" if taken is None else f"takes {budget.text(taken.of(budget))}"
        text = f"no pyramid of {branches} branches fits into {budget.text()} here"
        raise ConfigError(f"{text}: the cheapest, {cheapest.title}, {reason}")
    while len(measured) < runs:
        fixed, growing = costs[newest]
        rate = 2 * rate if taken is None else max(taken.of(budget) - fixed, 0.0) / growing
        expected = {c: (f + rate * g) / budget.limit for c, (f, g) in costs.items() if g <= _LARGEST_STEP * growing}
        proposals = rank([(c, part) for c, part in expected.items() if part <= _CAUTION], _flops(expected))
        newest = next((p.candidate for p in proposals if p.candidate not in measured), None)
        if newest is None:
            break
        measured[newest] = taken = run(newest)
    fitting = {c: m.of(budget) / budget.limit for c, m in measured.items() if m and m.of(budget) <= budget.limit}
    flops_limit = _flops(fitting)
    return Search(proposals=rank(fitting.items(), flops_limit), measured=measured, flops_limit=flops_limit)


def _expected(candidate: Candidate, budget: Budget) -> tuple[float, float]:
    """What a candidate costs for certain, and a number that the rest of its cost grows with.

    Time grows with the multiply-accumulates, here with those of merging; memory beyond the weights with the largest
    maps, which are merged at the width of Branch 1.
    """
    if budget.kind == "latency":
        return 0.0, float(published_count(candidate.config, rule="merging").total.macs)
    return 4.0 * candidate.params, float(candidate.largest_width * candidate.image_sizes[0] ** 2)


def _flops(parts: Mapping[Candidate, float]) -> float:
    """FLOPs that the whole budget amounts to, from the part of it that the most costly candidate within it takes."""
    fullest = max((c for c in parts if parts[c] <= 1), key=parts.__getitem__)
    return fullest.flops / parts[fullest]


def _run(candidate: Candidate, machine: Machine) -> Measured:
    torch.set_num_threads(machine.threads)
    device = torch.device(machine.device)
    on_gpu = device.type == "cuda"
    before = 0 if on_gpu else _reset_high_water()
    model = DensePIIP(candidate.config).eval().to(device)
    if on_gpu:
        torch.cuda.reset_peak_memory_stats(device)
    side = candidate.image_sizes[0]
    image = torch.rand(1, 3, side, side, device=device)
    _time_forward(model, image, machine.dtype)  # the first one also loads kernels
    times: list[float] = []
    while len(times) < _FORWARDS and sum(times) < _ENOUGH_SECONDS:
        times.append(_time_forward(model, image, machine.dtype))
    peak = torch.cuda.max_memory_allocated(device) if on_gpu else _high_water() - before
    return Measured(seconds=statistics.median(times), peak_bytes=peak)


@torch.inference_mode()
def _time_forward(model: DensePIIP, image: Tensor, dtype: str) -> float:
    start = time.perf_counter()
    with torch.autocast(image.device.type, dtype=torch.bfloat16, enabled=dtype == "bfloat16"):
        model(image)
    if image.is_cuda:
        torch.cuda.synchronize(image.device)
    return time.perf_counter() - start


_HIGH_WATER_RESET = Path("/proc/self/clear_refs")


def _reset_high_water() -> int:
    """Lets the highest resident memory count from now on, and returns it, in bytes."""
    _HIGH_WATER_RESET.write_text("5")
    return _high_water()


def _high_water() -> int:
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status["VmHWM"].split()[0]) * 1024


def _cpu_name() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.machine()
