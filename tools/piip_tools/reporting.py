"""Results of the benchmarks as tables and charts."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from tabulate import tabulate

from piip_core.errors import UserError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["draw_bars", "format_table", "new_figure"]


def format_table(results: Iterable[Mapping[str, Any]], columns: Mapping[str, str]) -> str:
    """A line per result. `columns` are the templates of the cells by their headers; formatted numbers stand right."""
    cells = [[template.format(**result) for template in columns.values()] for result in results]
    align = ["right" if ":" in template else "left" for template in columns.values()]
    return tabulate(cells, list(columns), colalign=align, disable_numparse=True)


def new_figure(size: tuple[float, float], title: str) -> Figure:
    """An empty figure, `size` in inches.

    Raises:
        UserError: Without matplotlib.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UserError(f"A chart needs matplotlib ({error}): pip install matplotlib") from error
    figure = Figure(figsize=size, layout="constrained")
    figure.suptitle(title)
    return figure


def draw_bars(
    axes: Axes,
    names: Sequence[str],
    series: Mapping[str, Sequence[float]],
    *,
    xlabel: str,
    labels: Mapping[str, Sequence[str]] | None = None,
    stacked: bool = False,
) -> None:
    """Draws a horizontal bar for each of `names` and each series, with its label, beside or after each other."""
    height = 0.8 if stacked else 0.8 / len(series)
    left = [0.0] * len(names)
    for index, (name, values) in enumerate(series.items()):
        offset = 0 if stacked else (index - (len(series) - 1) / 2) * height
        bars = axes.barh([place + offset for place in range(len(names))], values, height, left, label=name)
        if labels is not None:
            axes.bar_label(bars, labels[name], padding=3, fontsize=8)
        if stacked:
            left = [start + value for start, value in zip(left, values, strict=True)]
    if labels is not None:
        axes.set_xlim(0, 1.75 * max(max(values) for values in series.values()))
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.set_yticks(range(len(names)), names)
    axes.set_xlabel(xlabel)
    axes.spines[["top", "right"]].set_visible(False)
