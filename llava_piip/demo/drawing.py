"""Dialogues of the chat demo, drawn beside the images that they are about."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

from piip_core.files import atomic_path

from .questions import Question
from .scoring import is_right

__all__ = ["draw_dialogues"]

_RIGHT, _WRONG, _ASKED = "#1a7f37", "#cf222e", "#57606a"
_QUESTION, _ANSWER = 52, 30  # most letters of a line


def draw_dialogues(
    path: Path | str, dialogues: Sequence[tuple[Path, Sequence[tuple[Question, str]]]], title: str = ""
) -> None:
    """Draws images, each with its dialogue beside it, and writes them as one PNG.

    Right answers are green, wrong ones red with the right answer after them.

    Args:
        path: File to write.
        dialogues: An image, and the questions about it with their answers, for each; at least one.
        title: Text above them.
    """
    columns = min(2, len(dialogues))
    rows = -(-len(dialogues) // columns)
    figure = Figure(figsize=(6.4 * columns, 2.3 * rows + 0.6 * bool(title)), layout="constrained", dpi=120)
    figure.get_layout_engine().set(w_pad=0.08, h_pad=0.08, wspace=0.02, hspace=0.02)
    if title:
        figure.suptitle(title, fontsize=15, weight="bold")
    panels = figure.subplots(rows, 2 * columns, squeeze=False, width_ratios=[2, 3.6] * columns)
    for axes in panels.flat:
        axes.set_axis_off()
    for (left, right), (image, rounds) in zip(panels.reshape(-1, 2), dialogues, strict=False):
        with Image.open(image) as opened:
            left.imshow(opened.convert("RGB"), interpolation="lanczos")
        _write_rounds(right, rounds)
    with atomic_path(path) as aside:
        figure.savefig(aside, format="png")


def _write_rounds(axes: Axes, rounds: Sequence[tuple[Question, str]]) -> None:
    """Writes questions and answers from top to bottom."""
    axes.set(xlim=(0, 1), ylim=(0, 1))
    height = 1 / max(len(rounds), 4)
    for index, (question, answer) in enumerate(rounds):
        top, right = 1 - index * height, is_right(question, answer)
        axes.text(0, top - 0.3 * height, _shorten(question.text, _QUESTION), color=_ASKED, fontsize=11, va="center")
        text = f"{'✓' if right else '✗'}  {_shorten(answer, _ANSWER) or '(nothing)'}"
        style = dict(color=_RIGHT if right else _WRONG, fontsize=12, weight="bold", va="center")
        said = axes.text(0.02, top - 0.7 * height, text, **style)
        if not right:
            style = dict(color=_ASKED, fontsize=10, va="center")
            axes.annotate(f"   right: {question.answer}", (1, 0.5), xycoords=said, **style)


def _shorten(text: str, most: int) -> str:
    """One line of at most `most` letters; dollar signs are not formulas."""
    line = " ".join(text.split())
    return (line if len(line) <= most else line[: most - 1] + "…").replace("$", r"\$")
