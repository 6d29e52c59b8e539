"""Timings as a table and as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from tabulate import tabulate

from piip_core.errors import UserError

from .measuring import DIRECTIONS, PYTORCH, Timing

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["draw_timings", "format_table", "new_figure"]


def format_table(timings: Sequence[Timing]) -> str:
    """The timings as a table; "of copy" is the share of a copy's speed that ours reaches "alone", not in turns."""
    peers = list(timings[0].peers_ms) if timings else []
    headers = [
        "case",
        "form",
        "D",
        "dtype",
        "direction",
        "ours ms",
        f"{PYTORCH} ms",
        "ratio",
        "alone ms",
        "MB",
        "of copy",
    ]
    rows = [
        [
            *(t.case, t.form, t.width, t.dtype, t.direction, f"{t.ours_ms:.3f}", f"{t.pytorch_ms:.3f}"),
            *(f"{t.ratio:.1f}x", f"{t.alone_ms:.3f}", f"{1e-6 * t.bytes_moved:.1f}", f"{t.copy_share:.0%}"),
            *(f"{t.peers_ms[peer]:.3f}" for peer in peers),
        ]
        for t in timings
    ]
    right = (2, *range(5, 11 + len(peers)))
    align = ["right" if column in right else "left" for column in range(11 + len(peers))]
    return tabulate(rows, [*headers, *(f"{peer} ms" for peer in peers)], "plain", colalign=align, disable_numparse=True)


def draw_timings(timings: Sequence[Timing], title: str) -> Figure:
    """Speed relative to PyTorch as bars: a row of axes per dtype, a column per direction.

    Raises:
        UserError: without matplotlib.
    """
    dtypes, cases = (list(dict.fromkeys(column)) for column in zip(*((t.dtype, t.case) for t in timings), strict=True))
    sides = ["ours", *timings[0].peers_ms]
    height = 0.8 / len(sides)
    size = (12, 1.2 + len(dtypes) * (0.8 + 0.35 * len(cases) * max(1.0, 0.6 * len(sides))))
    figure = new_figure(size, title)
    for row, dtype in zip(figure.subplots(len(dtypes), 2, squeeze=False, sharey="row"), dtypes, strict=True):
        for axes, direction in zip(row, DIRECTIONS, strict=True):
            shown = [t for t in timings if (t.dtype, t.direction) == (dtype, direction)]
            for index, side in enumerate(sides):
                times = [t.ours_ms if side == "ours" else t.peers_ms[side] for t in shown]
                ratios = [t.pytorch_ms / time for t, time in zip(shown, times, strict=True)]
                places = [place + (index - (len(sides) - 1) / 2) * height for place in range(len(shown))]
                bars = axes.barh(places, ratios, height, label=side, color="C0" if side == "ours" else f"C{6 + index}")
                share = [f", {t.copy_share:.0%} of copy" if side == "ours" else "" for t in shown]
                text = [
                    f"{ratio:.1f}x ({time:.2f} ms{more})"
                    for ratio, time, more in zip(ratios, times, share, strict=True)
                ]
                axes.bar_label(bars, text, padding=3, fontsize=8)
            axes.axvline(1, color="0.5", linewidth=0.8)
            axes.set_xlim(0, 1.75 * max(t.ratio for t in shown))
            axes.set_yticks(range(len(shown)), [f"{t.case}, D = {t.width}" for t in shown])
            axes.set_xlabel(f"{direction}, {dtype}: times as fast as {PYTORCH}")
            axes.spines[["top", "right"]].set_visible(False)
        row[0].invert_yaxis()
    if len(sides) > 1:
        figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside lower right", ncols=len(sides))
    return figure


def new_figure(size: tuple[float, float], title: str) -> Figure:
    """An empty picture, `size` in inches.

    Raises:
        UserError: without matplotlib.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UserError(f"A picture needs matplotlib ({error}): pip install matplotlib") from error
    figure = Figure(figsize=size, layout="constrained")
    figure.suptitle(title)
    return figure
