"""Scatter of the published models' cost and accuracy, with proposals in it."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.figure import Figure

from .candidates import published_mask_rcnn, same_models
from .proposals import Proposal

_COLOURS = ("#0b7d8c", "#4a3fb5", "#e08a00", "#7a7a7a")
_PROPOSAL = "#c0272d"


def draw_plan(proposals: Sequence[Proposal], title: str) -> Figure:
    """GFLOPs (published count) and box AP of the published Mask R-CNN models, with the cost of each proposal.

    A proposal has no accuracy before it is trained, so it is a vertical line with its name below the models.
    """
    figure = Figure(figsize=(10.2, 7), layout="constrained", dpi=100)
    axes = figure.add_subplot(title=title, xlabel="GFLOPs (published count)", xscale="log")
    axes.set_ylabel("published COCO box AP (Mask R-CNN)")
    known = [one for one in published_mask_rcnn() if one[2] is not None]
    for family, colour in zip(dict.fromkeys(entry.table for entry, _, _ in known), _COLOURS, strict=True):
        members = sorted((one for one in known if one[0].table == family), key=lambda one: one[1])
        axes.scatter(*zip(*(one[1:] for one in members), strict=True), s=30, color=colour, label=family, zorder=3)
        for largest in members:
            alike = [one for one in members if same_models(one[0].config, largest[0].config)]
            if alike[-1] is largest:  # each combination of models once
                axes.plot(*zip(*(one[1:] for one in alike), strict=True), color=colour, lw=1, alpha=0.6)
                axes.annotate(largest[0].title, largest[1:], (5, -3), textcoords="offset points", color=colour, size=7)
    bottom = axes.get_ylim()[0]
    for number, proposal in enumerate(proposals, 1):
        gflops, height = proposal.candidate.flops / 1e9, bottom - 0.5 * number
        axes.axvline(gflops, color=_PROPOSAL, lw=0.8, alpha=0.5, zorder=1)
        text = f"{number}  {proposal.candidate.title}, {gflops:.0f}G"
        axes.annotate(text, (gflops, height), (8, -3), textcoords="offset points", color=_PROPOSAL, size=8.5)
    axes.set_ylim(bottom - 0.5 * len(proposals) - 0.5)
    axes.set_xlim(right=1.5 * axes.get_xlim()[1])  # room for names
    axes.xaxis.set_major_formatter("{x:.0f}")
    axes.grid(alpha=0.25)
    axes.legend(loc="lower right", fontsize=8.5)
    return figure
