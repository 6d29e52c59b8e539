"""Measurements as tables."""

from __future__ import annotations

from collections.abc import Sequence

from tabulate import tabulate

from .breakdown import Breakdown
from .measuring import Measurement

__all__ = ["breakdown_table", "measurement_table"]


def measurement_table(measurements: Sequence[Measurement]) -> str:
    """One row per side and precision; ratios are to the last side of the precision."""
    header = ["side", "image", "precision", "median s", "time ratio", "peak MB", "peak ratio"]
    rows = []
    for m in measurements:
        numbers = [f"{m.median:.3f}", f"{m.ratio:.2f}", f"{m.peak / 1e6:.0f}", f"{m.peak_ratio:.2f}"]
        rows.append([m.side, m.image_size, m.precision, *numbers])
    return tabulate(rows, header, disable_numparse=True, colalign=("left", "right", "left", *["right"] * 4))


def breakdown_table(breakdowns: Sequence[Breakdown]) -> str:
    """One row per part, one column per side and precision: seconds and share."""
    names = dict.fromkeys(name for breakdown in breakdowns for name in breakdown.seconds)
    columns = []
    for breakdown in breakdowns:
        total = sum(breakdown.seconds.values())
        cells = [breakdown.seconds.get(name, 0.0) for name in names] + [total]
        columns.append([f"{seconds:.3f} ({seconds / total:.0%})" for seconds in cells])
    header = ["seconds (share)", *(f"{b.side}\n{b.precision}" for b in breakdowns)]
    rows = zip([*names, "total"], *columns, strict=True)
    return tabulate(rows, header, disable_numparse=True, colalign=("left", *["right"] * len(columns)))
