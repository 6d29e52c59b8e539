"""Measurements as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from ..operator_benchmark import new_figure
from .measuring import Measurement

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["draw_measurements"]


def draw_measurements(measurements: Sequence[Measurement], title: str) -> Figure:
    """Times and peak memory as bars, a row of two axes per precision; ratios to the peer stand at the bars.

    Raises:
        UserError: Without matplotlib.
    """
    precisions = list(dict.fromkeys(m.precision for m in measurements))
    most = max(sum(m.precision == precision for m in measurements) for precision in precisions)
    figure = new_figure((11, 1.0 + len(precisions) * (0.7 + 0.35 * most)), title)
    rows = figure.subplots(len(precisions), 2, squeeze=False, sharey="row")
    for row, precision in zip(rows, precisions, strict=True):
        shown = [m for m in measurements if m.precision == precision]
        names = [m.side for m in shown]
        columns = (
            (row[0], [m.median for m in shown], [m.ratio for m in shown], "seconds"),
            (row[1], [m.peak / 1e9 for m in shown], [m.peak_ratio for m in shown], "peak memory, GB"),
        )
        for axes, values, ratios, label in columns:
            bars = axes.barh(names, values, color=["C7" if m is shown[-1] else "C0" for m in shown])
            axes.bar_label(bars, [f"{v:.2f}  ({r:.2f}x)" for v, r in zip(values, ratios, strict=True)], padding=3)
            axes.set_xlim(0, 1.3 * max(values))
            axes.set_xlabel(f"{label}, {precision}")
            axes.spines[["top", "right"]].set_visible(False)
        row[0].invert_yaxis()
    return figure
