"""What candidates really take on this machine."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Literal

import torch

from piip_core.errors import ConfigError
from piip_core.pyramid import DensePIIP

from ..flops.published import published_count
from ..timing import clock_for, limited_threads, peak_memory
from .candidates import Budget, Candidate
from .proposals import Measured, Proposal, allowed, rank

_FORWARDS, _ENOUGH_SECONDS = 5, 4.0  # forward passes that are timed, fewer if they take this long
_CAUTION = 0.95  # part of the budget that the next candidate is chosen for
_LARGEST_STEP = 8  # how many times the growing cost of the last one the next candidate may have


def measure(
    candidate: Candidate, *, device: str = "cpu", dtype: Literal["float32", "bfloat16"] = "float32", threads: int = 1
) -> Measured | None:
    """Runs a candidate with random weights, "bfloat16" by autocast; None if the GPU has not enough memory."""
    kind, side = torch.device(device).type, candidate.image_sizes[0]
    clock = time.perf_counter if kind == "cpu" else clock_for(device, threads)
    times: list[float] = []
    try:
        with limited_threads(threads), torch.inference_mode():
            model = DensePIIP(candidate.config).eval().to(device)
            image = torch.rand(1, 3, side, side, device=device)
            forward = torch.autocast(kind, torch.bfloat16, enabled=dtype == "bfloat16")(lambda: model(image))
            peak = peak_memory(forward, model, device)  # the first one also loads kernels
            while len(times) < _FORWARDS and sum(times) < _ENOUGH_SECONDS:
                start = clock()
                forward()
                times.append(clock() - start)
    except torch.OutOfMemoryError:
        return None
    weights = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
    return Measured(seconds=statistics.median(times), peak_bytes=weights + image.nbytes + peak)


def search(
    branches: int,
    budget: Budget,
    run: Callable[[Candidate], Measured | None],
    *,
    params_limit: float | None = None,
    models: str | None = None,
    runs: int = 6,
) -> tuple[list[Proposal], float]:
    """Finds pyramids within a measured budget, with few measurements.

    The cheapest candidate is measured first. From each measurement follows about what the others take; the best
    proposal that should then fit, and was not measured yet, comes next, up to `runs` measurements by `run`. The other
    arguments are those of `propose`.

    Returns:
        Measured candidates within the budget, best first, and what the budget amounts to in FLOPs.

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
    proposals = rank(fitting.items(), _flops(fitting))
    return [replace(proposal, measured=measured[proposal.candidate]) for proposal in proposals], _flops(fitting)


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
