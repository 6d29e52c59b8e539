"""Scatter of the published models' cost and accuracy, with proposals in it."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from .candidates import published_mask_rcnn, same_models
from .proposals import Proposal

_COLOURS = ("#0b7d8c", "#4a3fb5", "#e08a00", "#7a7a7a")
_PROPOSAL = "#c0272d"
_TICKS = (20, 50, 100, 200, 300, 500, 1000, 2000, 5000, 10000, 20000)


def draw_plan(proposals: Sequence[Proposal], title: str) -> Figure:
    """GFLOPs (published count) and box AP of the published Mask R-CNN models, and below the cost of each proposal.

    A proposal has no accuracy before it is trained, so it is on the horizontal axis alone.
    """
    figure = Figure(figsize=(10.2, 6.0 + 0.24 * len(proposals)), layout="constrained", dpi=100)
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(5.6, 0.3 + 0.24 * len(proposals)))
    above.set_title(title, fontsize=11)
    above.set_xscale("log")
    _draw_published(above)
    for number, proposal in enumerate(proposals, 1):
        gflops = proposal.candidate.flops / 1e9
        above.axvline(gflops, color=_PROPOSAL, lw=0.8, alpha=0.5, zorder=1)
        below.plot([gflops, gflops], [0, number], color=_PROPOSAL, lw=0.8, alpha=0.5)
        below.plot(gflops, number, "v", color=_PROPOSAL, ms=6)
        text = f"{number}  {proposal.candidate.title}, {gflops:.0f}G"
        below.annotate(text, (gflops, number), (8, -3), textcoords="offset points", fontsize=8.5, color=_PROPOSAL)
    below.set_ylim(len(proposals) + 0.6, 0.2)
    below.set_yticks([])
    below.set_ylabel("proposals")
    low, high = above.get_xlim()
    above.set_xlim(low, high * 1.5)  # room for names
    ticks = [tick for tick in _TICKS if low <= tick <= high]
    below.set_xticks(ticks, [str(tick) for tick in ticks])
    below.set_xticks([], minor=True)
    below.set_xlabel("GFLOPs (published count, logarithmic)")
    return figure


def _draw_published(axes: Axes) -> None:
    """The published models, those with the same branches as a line with their name at its end."""
    known = [one for one in published_mask_rcnn() if one[2] is not None]
    for index, family in enumerate(dict.fromkeys(entry.table for entry, _, _ in known)):
        colour = _COLOURS[index % len(_COLOURS)]
        members = [one for one in known if one[0].table == family]
        axes.scatter(*zip(*(one[1:] for one in members), strict=True), s=30, color=colour, label=family, zorder=3)
        for first, *_ in members:
            alike = sorted((one for one in members if same_models(one[0].config, first.config)), key=lambda one: one[1])
            if alike[0][0] is first:  # each combination of models once
                axes.plot(*zip(*(one[1:] for one in alike), strict=True), color=colour, lw=1, alpha=0.6)
                axes.annotate(
                    first.title, alike[-1][1:], (5, -3), textcoords="offset points", fontsize=7.5, color=colour
                )
    axes.set_ylabel("published COCO box AP (Mask R-CNN)")
    axes.grid(alpha=0.25)
    axes.legend(loc="lower right", fontsize=8.5)
