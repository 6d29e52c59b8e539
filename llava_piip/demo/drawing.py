"""Pictures of the chat demo: dialogues beside what they are about."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from PIL import Image

from piip_core.files import atomic_path

from .questions import Question
from .scoring import is_right

__all__ = ["Dialogue", "draw_dialogues"]

_COLUMNS = 2
_RIGHT, _WRONG, _ASKED = "#1a7f37", "#cf222e", "#57606a"
_GREY = "#eaeef2"
_QUESTION, _ANSWER = 52, 30  # most letters of a line


@dataclass(frozen=True)
class Dialogue:
    """Questions about one picture, in the order they were asked, and the answers to them."""

    image: Path | None
    rounds: Sequence[tuple[Question, str]]


def draw_dialogues(path: Path | str, dialogues: Sequence[Dialogue], title: str = "") -> None:
    """Draws pictures, each with its dialogue beside it, and writes them as one PNG.

    Right answers are green, wrong ones red with the right answer behind them.

    Args:
        path: Picture to write.
        dialogues: What to draw.
        title: Text above it.

    Raises:
        ValueError: If there is nothing to draw.
    """
    if not dialogues:
        raise ValueError("no dialogues to draw: expected at least one")
    columns = min(_COLUMNS, len(dialogues))
    rows = -(-len(dialogues) // columns)
    figure = Figure(figsize=(6.4 * columns, 2.3 * rows + 0.6 * bool(title)), layout="constrained", dpi=120)
    figure.get_layout_engine().set(w_pad=0.08, h_pad=0.08, wspace=0.02, hspace=0.02)
    if title:
        figure.suptitle(title, fontsize=15, weight="bold")
    panels = figure.subplots(rows, 2 * columns, squeeze=False, width_ratios=[2, 3.6] * columns)
    for axes in panels.flat:
        axes.set_axis_off()
    for (left, right), dialogue in zip(panels.reshape(-1, 2), dialogues, strict=False):
        _show(left, dialogue.image)
        _write_rounds(right, dialogue.rounds)
    with atomic_path(path) as aside:
        FigureCanvasAgg(figure).print_png(str(aside))


def _show(axes: Axes, image: Path | None) -> None:
    """Draws a picture, or an empty one that says so."""
    if image is None:
        axes.imshow([[to_rgb(_GREY)]])
        axes.text(0, 0, "no picture", color=_ASKED, fontsize=11, ha="center", va="center")
        return
    with Image.open(image) as picture:
        axes.imshow(picture.convert("RGB"), interpolation="lanczos")


def _write_rounds(axes: Axes, rounds: Sequence[tuple[Question, str]]) -> None:
    """Writes questions and answers from top to bottom."""
    axes.set(xlim=(0, 1), ylim=(0, 1))
    height = 1 / max(len(rounds), 4)
    for number, (question, answer) in enumerate(rounds):
        top = 1 - number * height
        axes.text(0, top - 0.3 * height, _shortened(question.text, _QUESTION), color=_ASKED, fontsize=11, va="center")
        right = is_right(question, answer)
        said = axes.text(
            0.02,
            top - 0.7 * height,
            f"{'✓' if right else '✗'}  {_shortened(answer, _ANSWER) or '(nothing)'}",
            color=_RIGHT if right else _WRONG,
            fontsize=12,
            weight="bold",
            va="center",
        )
        if not right:
            axes.annotate(
                f"   right: {question.answer}", (1, 0.5), xycoords=said, va="center", color=_ASKED, fontsize=10
            )


def _shortened(text: str, most: int) -> str:
    """One line of at most `most` letters; dollar signs are not formulas."""
    line = " ".join(text.split())
    return (line if len(line) <= most else line[: most - 1] + "…").replace("$", r"\$")
