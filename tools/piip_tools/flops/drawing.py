"""The paper's figures of cost and box AP, with our counts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from matplotlib.figure import Figure

from piip_core import zoo

from .published import published_count
from .tables import paper_number


def draw_figure(title: str, panels: Mapping[str, Mapping[str, Sequence[zoo.ZooEntry]]]) -> Figure:
    """A figure of `zoo.ablations.FIGURES`: rings at the printed numbers, joined dots at our counts.

    A point without a printed score is a tick at the bottom, at its count.
    """
    figure = Figure(figsize=(8.5 * len(panels), 5.5), layout="constrained", dpi=100)
    figure.suptitle(title)
    for axes, (panel, curves) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True):
        axes.set(title=panel, xlabel="GFLOPs (multiply-accumulates)", ylabel="COCO box AP (Mask R-CNN 1x)")
        for number, (label, points) in enumerate(curves.items()):
            colour, height = f"C{number}", 0.02 * (number + 1)  # ticks of several curves beneath each other
            scores = [paper_number(point, "box_ap") for point in points]
            known = [point for point, score in zip(points, scores, strict=True) if score is not None]
            scores = [score for score in scores if score is not None]
            axes.plot([_count(point) for point in known], scores, color=colour, marker=".", lw=1, label=label)
            printed = [paper_number(point, "flops_g") for point in known]
            axes.plot(printed, scores, "o", color=colour, fillstyle="none")
            others = [_count(point) for point in points if point not in known]
            axes.plot(others, [height] * len(others), "|", color=colour, ms=9, transform=axes.get_xaxis_transform())
        axes.plot([], "o", color="grey", fillstyle="none", label="printed")
        axes.plot([], ".", color="grey", label="our count")
        axes.plot([], "|", color="grey", label="our count, score not printed")
        axes.margins(y=0.2)
        axes.grid(alpha=0.25)
        axes.legend(fontsize=8)
    return figure


def _count(point: zoo.ZooEntry) -> float:
    return published_count(point.config).total.macs / 1e9
