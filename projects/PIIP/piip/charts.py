"""Charts of a run: curves, bars by class, precision over recall, confusion matrices, images with boxes."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from PIL import Image

from piip_core.files import atomic_path

COLOURS = colormaps["tab20"].colors
_NAME = 24  # characters of a class name that are drawn
_NUMBERED = 25  # classes up to which a matrix has numbers
_LARGEST = 81  # classes that a matrix can show, the background among them
_WIDTH = 11.2  # inches of a picture, at 110 dots
_SIDE = 640  # pixels of an image in a grid

Curves = Mapping[str, tuple[Sequence[float], Sequence[float]]]
"""Steps and values by the name of what was measured."""

Boxes = Sequence[tuple[Sequence[float], str, str]]
"""Left, top, width and height in pixels, a text and a colour."""


class Section(NamedTuple):
    """A part of a report.

    Attributes:
        title: What it is about.
        text: What is to be known.
        picture: File beside the others of the report; empty: none.
        rows: A table of text, the names of the columns first.
        folded: Whether the table has to be opened, because it is long.
    """

    title: str
    text: str = ""
    picture: str = ""
    rows: Sequence[Sequence[str]] = ()
    folded: bool = False


def read_metrics(path: Path | str) -> Curves:
    """Reads the JSON lines that Detectron2's JSONWriter appends to.

    A resumed run repeats iterations: the last value of each counts.
    """
    points: dict[str, dict[int, float]] = {}
    for line in Path(path).read_text().splitlines():
        entry = json.loads(line)
        for name, value in entry.items():
            if name != "iteration":
                points.setdefault(name, {})[int(entry["iteration"])] = value
    return {name: (sorted(values), [values[step] for step in sorted(values)]) for name, values in points.items()}


def draw_curves(path: Path, losses: Curves, scores: Curves, rate: Curves) -> None:
    """Draws losses, scores in percent and the learning rate over the iterations; what is empty is left out."""
    panels = [(losses, "loss"), (scores, "score in %"), (rate, "learning rate")]
    panels = [(curves, label) for curves, label in panels if curves]
    figure = Figure(figsize=(_WIDTH / 3 * len(panels), 3.3), layout="constrained")
    for axes, (curves, label) in zip(figure.subplots(1, len(panels), squeeze=False).flat, panels, strict=True):
        for name, (steps, values) in curves.items():
            last = f" {values[-1]:.1f}" if curves is scores else ""
            axes.plot(steps, values, "o-" if curves is scores else "-", markersize=3, label=name + last)
        axes.set(xlabel="iteration", ylabel=label, ylim=(0, None))
        axes.grid(alpha=0.3)
        if len(curves) > 1 or curves is scores:
            axes.legend(fontsize=8)
    write_figure(figure, path)


def draw_bars(path: Path, names: Sequence[str], values: Sequence[float | None], label: str) -> None:
    """Draws a bar in percent for each class, the highest first, in as many columns as keep it legible.

    None stands for a class without a value, which is said in its place.
    """
    order = sorted(range(len(names)), key=lambda index: -1 if values[index] is None else values[index], reverse=True)
    columns = min(-(-len(names) // 30), 4)
    rows = -(-len(names) // columns)
    figure = Figure(figsize=(max(3.6 * columns, 6), 0.22 * rows + 0.8), layout="constrained")
    for column, axes in enumerate(figure.subplots(1, columns, squeeze=False).flat):
        part = order[column * rows : (column + 1) * rows]
        bars = axes.barh(range(len(part)), [values[index] or 0 for index in part], color=COLOURS[0])
        texts = ["no objects" if values[index] is None else f"{values[index]:.1f}" for index in part]
        axes.bar_label(bars, texts, padding=3, fontsize=8)
        axes.set(xlim=(0, 115), ylim=(rows - 0.4, -0.6), xticks=range(0, 101, 20), xlabel=label)
        axes.set_yticks(range(len(part)), [shorten_name(names[index]) for index in part], fontsize=8)
        axes.grid(axis="x", alpha=0.3)
    write_figure(figure, path)


def draw_precision_recall(
    path: Path, recall: np.ndarray, classes: Mapping[str, np.ndarray], means: Mapping[str, np.ndarray]
) -> None:
    """Draws precision (R,) over recall (R,): thin lines for classes, named if they are few, thick ones for means."""
    figure = Figure(figsize=(6.4, 5), layout="constrained")
    axes = figure.subplots()
    few = len(classes) <= 12
    for index, (name, precision) in enumerate(classes.items()):
        style = {"color": COLOURS[index], "label": shorten_name(name)} if few else {"color": "0.8"}
        axes.plot(recall, precision, linewidth=1, **style)
    for (name, precision), style in zip(means.items(), ("-", "--", ":"), strict=False):
        axes.plot(recall, precision, style, color="black", linewidth=2, label=name)
    axes.set(xlabel="recall", ylabel="precision", xlim=(0, 1), ylim=(0, 1.02))
    axes.grid(alpha=0.3)
    figure.legend(loc="outside right upper", fontsize=8)
    write_figure(figure, path)


def draw_confusion(path: Path, matrix: np.ndarray, names: Sequence[str]) -> str:
    """Draws a matrix of counts, truth in rows and predictions in columns, coloured by the share of the row.

    Returns:
        Which classes were left out because they would be too many: the least confused.
    """
    total, left_out = len(names), ""
    if total > _LARGEST:
        wrong = matrix - np.diag(np.diag(matrix))
        kept = np.sort(np.argsort(-(wrong.sum(0) + wrong.sum(1)), kind="stable")[:_LARGEST])
        matrix, names = matrix[np.ix_(kept, kept)], [names[index] for index in kept]
        left_out = f"The {_LARGEST} most confused of {total} are shown."
    share = matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1)
    count = len(names)
    side = max(0.17 * count, 0.55 * min(count, _NUMBERED))
    figure = Figure(figsize=(max(side, 3) + 2, max(side, 3) + 1.4), layout="constrained")
    axes = figure.subplots()
    edges = np.arange(count + 1) - 0.5
    axes.pcolormesh(edges, edges, share, cmap="Blues", vmin=0, vmax=1, edgecolors="0.92", linewidth=0.3)
    axes.set(aspect="equal", ylim=(count - 0.5, -0.5))
    size = 9 if count <= _NUMBERED else 7
    labels = [shorten_name(name) for name in names]
    axes.set_xticks(range(count), labels, rotation=90, fontsize=size)
    axes.set_yticks(range(count), labels, fontsize=size)
    axes.set(xlabel="predicted", ylabel="truth")
    if count <= _NUMBERED:
        for (row, column), value in np.ndenumerate(matrix):
            if value:
                text = f"{value}" if matrix.max() < 10**4 else f"{share[row, column]:.0%}"
                colour = "white" if share[row, column] > 0.5 else "black"
                axes.text(column, row, text, ha="center", va="center", fontsize=8, color=colour)
    write_figure(figure, path)
    return left_out


def draw_images(
    path: Path,
    panels: Sequence[tuple[str, np.ndarray, Boxes]],
    columns: int,
    legend: Mapping[str, str] | None = None,
) -> None:
    """Draws images in a grid, each with a title and boxes; `legend` says what colours stand for."""
    rows = -(-len(panels) // columns)
    shape = np.median([image.shape[0] / image.shape[1] for _, image, _ in panels])
    top = 0.8 if legend else 0.45  # inches
    side = min(max(shape, 0.6), 1.5) * _WIDTH / columns
    height = rows * (side + 0.45) + top - 0.45
    figure = Figure(figsize=(_WIDTH, height))
    edges = {"left": 0.005, "right": 0.995, "bottom": 0.005, "top": 1 - top / height}  # a layout engine takes seconds
    grid = figure.subplots(rows, columns, squeeze=False, gridspec_kw={**edges, "wspace": 0.03, "hspace": 0.45 / side})
    for axes in grid.flat:
        axes.set_axis_off()
    for axes, (title, image, boxes) in zip(grid.flat, panels, strict=False):
        lines = (textwrap.shorten(line, 150 // columns, placeholder=" …") for line in title.split("\n"))
        axes.set_title("\n".join(lines), fontsize=8)
        axes.imshow(_smaller(image), extent=(0, image.shape[1], image.shape[0], 0))
        for box in boxes:
            _draw_box(axes, *box)
    if legend:
        handles = [Rectangle((0, 0), 1, 1, fill=False, edgecolor=colour, linewidth=2) for colour in legend.values()]
        figure.legend(handles, list(legend), loc="upper center", ncols=len(legend), fontsize=9)
    write_figure(figure, path)


def _draw_box(axes: Axes, box: Sequence[float], text: str, colour: str) -> None:
    left, top, width, height = box
    axes.add_patch(Rectangle((left, top), width, height, fill=False, edgecolor=colour, linewidth=1.6))
    if text:  # inside of the image
        (_, right_edge), (bottom_edge, _) = axes.get_xlim(), axes.get_ylim()
        place = (left + width, "right") if left > 0.6 * right_edge else (max(left, 0), "left")
        style = {"ha": place[1], "va": "bottom" if top > 0.08 * bottom_edge else "top", "clip_on": True}
        frame = {"facecolor": colour, "edgecolor": "none", "pad": 1, "alpha": 0.85}
        axes.text(place[0], max(top, 0), text, fontsize=7, color="white", bbox=frame, **style)


def _smaller(image: np.ndarray) -> np.ndarray:
    small = Image.fromarray(image)
    small.thumbnail((_SIDE, _SIDE))
    return np.asarray(small)


def shorten_name(name: str) -> str:
    """A class name that fits beside others."""
    return name if len(name) <= _NAME else name[: _NAME - 1] + "…"


def write_figure(figure: Figure, path: Path) -> None:
    """Writes a figure as .png or .jpg, and the folder of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(path) as aside:
        figure.savefig(aside, format=path.suffix[1:], dpi=110)
