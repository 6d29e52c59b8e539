"""The paper's guidelines as rules, the candidates ranked by them, and what candidates really take on this machine.

Parameter-inverted order, two to four branches and interactions between neighbours hold for every candidate. The rules
below are what candidates differ in; a proposal names those that it meets, and nothing about its accuracy is predicted.
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Literal

import torch

from piip_core.errors import ConfigError
from piip_core.pyramid import DensePIIP
from piip_core.zoo import ZooEntry, deit_pyramid

from ..flops.published import published_count
from ..timing import clock_for, limited_threads, peak_memory
from .candidates import (
    IMAGE_SIZES,
    MODEL_SIZES,
    Budget,
    Candidate,
    Models,
    Task,
    candidates,
    named_candidates,
    published_mask_rcnn,
)

LEAST_SPENT = 0.9
LARGEST_SHARE = 0.5

_FORWARDS, _ENOUGH_SECONDS = 5, 4.0  # forward passes that are timed, fewer if they take this long
_CAUTION = 0.95  # part of the budget that the next candidate is chosen for
_LARGEST_STEP = 8  # how many times the growing cost of the last one the next candidate may have


@dataclass(frozen=True, kw_only=True)
class Rule:
    """One guideline: its short name in tables, what it asks for, and where it comes from."""

    key: str
    text: str
    source: str


RULES = (
    Rule(
        key="image",
        text="no other candidate of the same models that meets as many of the other rules has a larger first image",
        source="guideline 1 (section IV-F): first of all increase the resolution of the largest-image branch",
    ),
    Rule(
        key="model",
        text="the largest model is no larger than the baseline's: the cheapest published single-branch ViT that costs "
        "at least the budget, or else the largest one",
        source="guideline 2 (section IV-F): the largest model need not exceed the baseline model",
    ),
    Rule(
        key="sizes",
        text="the models are neighbours in T, S, B, L",
        source="guideline 2 (section IV-F): TSB is more cost-effective than TBL; so are all published pyramids",
    ),
    Rule(
        key="range",
        text="the ratio of each image to the next, and of the largest to the smallest, is one that the published "
        "DeiT pyramids span, and the smallest image of a detector or segmentor is no smaller than theirs",
        source="section IV-F: the pyramid has to maintain a large range of image scales (Table XIV, BBB)",
    ),
    Rule(
        key="even",
        text=f"no branch takes more than {LARGEST_SHARE:.0%} of the FLOPs",
        source="section IV-D (training from scratch): all branches should have similar computational costs",
    ),
    Rule(
        key="spent",
        text=f"at least {LEAST_SPENT:.0%} of the budget is used",
        source="ours: what is left over would pay for larger images",
    ),
)


@dataclass(frozen=True, kw_only=True)
class Measured:
    """Median time and highest memory of forward passes of backbone and feature pyramid, without a detector's heads.

    Memory holds weights and activations: on a CPU those of tensors, on a GPU what PyTorch allocated.
    """

    seconds: float
    peak_bytes: int

    def of(self, budget: Budget) -> float:
        """The number that a measured budget limits."""
        return self.seconds if budget.kind == "latency" else float(self.peak_bytes)


@dataclass(frozen=True, kw_only=True)
class Proposal:
    """A candidate within the budget, the keys of the `RULES` that it meets, and the part of the budget that it uses."""

    candidate: Candidate
    met: tuple[str, ...]
    spent: float | None
    measured: Measured | None = None


def baseline_for(flops_limit: float | None) -> ZooEntry:
    """The single-branch model that rule "model" compares with; the largest one without a limit."""
    singles = sorted((known for known in _published_deit() if len(known[0].config.branches) == 1), key=lambda k: k[1])
    for entry, flops_g, _ in singles:
        if flops_limit is not None and flops_g * 1e9 >= flops_limit:
            return entry
    return singles[-1][0]


def propose(
    branches: int,
    *,
    flops_limit: float | None = None,
    params_limit: float | None = None,
    models: Models | None = None,
    task: Task = "detection",
) -> list[Proposal]:
    """Pyramids within limits of the published count, best first: one for each models and largest image that fit.

    `models` are the only ones to take, smallest first, for example "TSB" or ("dinov3:s", "dinov3:l").

    Raises:
        ConfigError: If nothing fits; the message names the cheapest candidate.
    """
    pool = allowed(branches, models=models, params_limit=params_limit, task=task)
    fitting = [c for c in pool if flops_limit is None or c.flops <= flops_limit]
    if not fitting:
        least = min(pool, key=lambda c: c.flops)
        raise ConfigError(
            f"no pyramid of {branches} branches fits into {flops_limit / 1e9:.0f}G: "
            f"the cheapest, {least.title}, costs {least.flops / 1e9:.1f}G"
        )
    return rank([(c, None if flops_limit is None else c.flops / flops_limit) for c in fitting], flops_limit)


def allowed(
    branches: int, *, models: Models | None = None, params_limit: float | None = None, task: Task = "detection"
) -> list[Candidate]:
    """Candidates with the given models and no more parameters than the limit.

    Raises:
        ConfigError: If there are none.
    """
    if isinstance(models, tuple):
        pool = list(named_candidates(models, task))
    else:
        pool = [c for c in candidates(branches) if models is None or c.models == models]
    if not pool:
        raise ConfigError(f"models {models!r}: expected {branches} different ones of {MODEL_SIZES}, smallest first")
    fitting = [c for c in pool if params_limit is None or c.params <= params_limit]
    if not fitting:
        least = min(pool, key=lambda c: c.params)
        raise ConfigError(
            f"no pyramid of {branches} branches has at most {params_limit / 1e6:.0f}M parameters: "
            f"the smallest, {least.title}, has {least.params / 1e6:.1f}M"
        )
    return fitting


def rank(pool: Iterable[tuple[Candidate, float | None]], flops_limit: float | None) -> list[Proposal]:
    """Ranks candidates by the number of rules met.

    Among equals those that use the budget come first, then those with the larger first image, then those whose most
    expensive branch has the smaller share.

    `pool` has candidates with the part of the budget that each uses; rule "model" has the baseline of `flops_limit`.
    Of each combination of models and largest image the best candidate is returned.
    """
    checks = _checks(flops_limit)
    best: dict[tuple[Models, int], Proposal] = {}
    for candidate, spent in pool:
        met = [key for key, holds in checks.items() if holds(candidate)]
        if spent is not None and spent >= LEAST_SPENT:
            met.append("spent")
        proposal = Proposal(candidate=candidate, met=tuple(met), spent=spent)
        group = (candidate.models, candidate.image_sizes[0])
        if group not in best or _order(proposal) < _order(best[group]):
            best[group] = proposal
    return sorted(_with_image_rule(list(best.values())), key=_order)


def _order(proposal: Proposal) -> tuple[float, ...]:
    unspent = proposal.spent is not None and proposal.spent < LEAST_SPENT
    return -len(proposal.met), unspent, -proposal.candidate.image_sizes[0], max(proposal.candidate.shares)


def _with_image_rule(proposals: Sequence[Proposal]) -> list[Proposal]:
    """Adds rule "image" to the best of each combination of models."""
    first: dict[Models, Proposal] = {}
    for proposal in sorted(proposals, key=lambda p: (-len(p.met), -p.candidate.image_sizes[0])):
        first.setdefault(proposal.candidate.models, proposal)
    return [replace(p, met=("image", *p.met)) if first[p.candidate.models] is p else p for p in proposals]


def _checks(flops_limit: float | None) -> dict[str, Callable[[Candidate], bool]]:
    """The rules that concern a candidate by itself."""
    (largest,) = baseline_for(flops_limit).config.branches
    pyramids = [
        [branch.image_size for branch in reversed(entry.config.branches)]
        for entry, _, _ in _published_deit()
        if len(entry.config.branches) > 1
    ]
    steps = [a / b for sides in pyramids for a, b in itertools.pairwise(sides)]
    ranges = [sides[0] / sides[-1] for sides in pyramids]
    smallest = min(sides[-1] for sides in pyramids)

    def in_range(candidate: Candidate) -> bool:
        sides = candidate.image_sizes
        return (
            all(min(steps) <= a / b <= max(steps) for a, b in itertools.pairwise(sides))
            and min(ranges) <= sides[0] / sides[-1] <= max(ranges)
            and (sides[-1] >= smallest or candidate.task == "classification")
        )

    return {
        "model": lambda c: c.largest_width <= largest.network.embed_dim,
        "sizes": lambda c: isinstance(c.models, str) and c.models in MODEL_SIZES,
        "range": in_range,
        "even": lambda c: max(c.shares) <= LARGEST_SHARE,
    }


@cache
def _published_deit() -> list[tuple[ZooEntry, float, float | None]]:
    """Published models of the networks that candidates are made of."""
    own = deit_pyramid(MODEL_SIZES, IMAGE_SIZES[: len(MODEL_SIZES)], window_size=28)
    pretrained = {branch.pretrained for branch in own.branches}
    return [known for known in published_mask_rcnn() if {b.pretrained for b in known[0].config.branches} <= pretrained]


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
    models: Models | None = None,
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
