"""Results as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from piip_core.files import atomic_path

from .measuring import SideResult

__all__ = ["draw_results"]


def draw_results(results: Sequence[SideResult], path: str | Path, *, note: str = "") -> None:
    """Draws the time to the first token in parts, and that of a second question by what was kept.

    Args:
        results: Of `compare`, with the language model.
        path: A .png file.
        note: A line below: where and how this was measured.
    """
    figure = Figure(figsize=(10, 1.8 + 0.5 * len(results) * 2), layout="constrained")
    FigureCanvasAgg(figure)
    first, second = figure.subplots(1, 2, width_ratios=(1.3, 1))
    names = [result.name.replace(", ", "\n") for result in results]
    left = [0.0] * len(results)
    for title, seconds in (
        ("pixel values", [result.prepare_s for result in results]),
        ("vision encoder", [result.vision_s for result in results]),
        ("language model", [result.first_token_s - result.vision_s - result.prepare_s for result in results]),
    ):
        first.barh(names, seconds, left=left, label=title)
        left = [start + length for start, length in zip(left, seconds, strict=True)]
    first.set(title="First token of an answer", xlabel="seconds")
    kept = list(results[0].second_s)
    height = 0.8 / len(kept)
    for number, name in enumerate(kept):
        places = [row + (number - (len(kept) - 1) / 2) * height for row in range(len(results))]
        seconds = [result.second_s[name] for result in results]
        second.barh(places, seconds, height, label=f"{name} kept", color=f"C{number + 3}")
    second.set(title="First token of a second answer", xlabel="seconds", yticks=[])
    for axes in (first, second):
        axes.invert_yaxis()
        axes.legend(fontsize=8)
        axes.spines[["top", "right"]].set_visible(False)
    if note:
        figure.supxlabel(note, fontsize=8)
    with atomic_path(Path(path)) as file:
        figure.savefig(file, format="png", dpi=120)
