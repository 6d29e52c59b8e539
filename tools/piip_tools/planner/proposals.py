"""The paper's guidelines as rules, and the candidates ranked by them.

Parameter-inverted order, two to four branches and interactions between neighbours hold for every candidate. The rules
below are what candidates differ in; a proposal names those that it meets, and nothing about its accuracy is predicted.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cache

from piip_core.errors import ConfigError
from piip_core.zoo import ZooEntry, deit_pyramid

from .candidates import IMAGE_SIZES, MODEL_SIZES, Budget, Candidate, candidates, published_mask_rcnn

LEAST_SPENT = 0.9
LARGEST_SHARE = 0.5


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
        "DeiT pyramids span, and the smallest image is no smaller than theirs",
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
    models: str | None = None,
) -> list[Proposal]:
    """Pyramids within limits of the published count, best first: one for each models and largest image that fit.

    `models` are the only ones to take, smallest first, for example "TSB".

    Raises:
        ConfigError: If nothing fits; the message names the cheapest candidate.
    """
    pool = allowed(branches, models=models, params_limit=params_limit)
    fitting = [c for c in pool if flops_limit is None or c.flops <= flops_limit]
    if not fitting:
        least = min(pool, key=lambda c: c.flops)
        raise ConfigError(
            f"no pyramid of {branches} branches fits into {flops_limit / 1e9:.0f}G: "
            f"the cheapest, {least.title}, costs {least.flops / 1e9:.1f}G"
        )
    return rank([(c, None if flops_limit is None else c.flops / flops_limit) for c in fitting], flops_limit)


def allowed(branches: int, *, models: str | None = None, params_limit: float | None = None) -> list[Candidate]:
    """Candidates with the given models and no more parameters than the limit.

    Raises:
        ConfigError: If there are none.
    """
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
    best: dict[tuple[str, int], Proposal] = {}
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
    first: dict[str, Proposal] = {}
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
            all(min(steps) <= ratio <= max(steps) for ratio in candidate.ratios)
            and min(ranges) <= sides[0] / sides[-1] <= max(ranges)
            and sides[-1] >= smallest
        )

    return {
        "model": lambda c: c.largest_width <= largest.network.embed_dim,
        "sizes": lambda c: c.models in MODEL_SIZES,
        "range": in_range,
        "even": lambda c: max(c.shares) <= LARGEST_SHARE,
    }


@cache
def _published_deit() -> list[tuple[ZooEntry, float, float | None]]:
    """Published models of the networks that candidates are made of."""
    own = deit_pyramid(MODEL_SIZES, IMAGE_SIZES[: len(MODEL_SIZES)], window_size=28)
    pretrained = {branch.pretrained for branch in own.branches}
    return [known for known in published_mask_rcnn() if {b.pretrained for b in known[0].config.branches} <= pretrained]
