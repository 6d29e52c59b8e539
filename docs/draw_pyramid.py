"""Draws docs/pyramid.png: the branches, interactions and merging of a published pyramid.

Example:
    python docs/draw_pyramid.py
"""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch, Rectangle
from skimage import data

from piip_core import zoo

OUTPUT = Path(__file__).with_name("pyramid.png")
CONFIG = zoo.get("piip_tsb_1568_1120_672").config
SIZES = {network.embed_dim: size for size, network in zoo.VIT.items()}  # 768: "B"
COLOURS = ("#3b6ea5", "#4f9d89", "#d08a3c")
INK, EXCHANGE = "#333333", "#a33a4e"
ROWS = (5.4, 3.45, 1.3)  # centre of each branch, Branch 1 on top
SEGMENTS = (3.9, 5.5, 7.1, 8.7)  # left edge of the blocks between two interactions; four drawn
WIDTH = 1.1


def box(axes: Axes, x: float, y: float, width: float, height: float, colour: str, text: str = "") -> None:
    """A filled box around the height y, with text in its middle."""
    style = "round,pad=0,rounding_size=0.06"
    axes.add_patch(FancyBboxPatch((x, y - height / 2), width, height, boxstyle=style, fc=colour, ec="none"))
    axes.text(x + width / 2, y, text, ha="center", va="center", color="white", fontsize=11, weight="bold")


def arrow(
    axes: Axes, start: tuple[float, float], stop: tuple[float, float], colour: str = INK, style: str = "->"
) -> None:
    """An arrow that begins and ends exactly there."""
    look = {"arrowstyle": style, "color": colour, "lw": 1.6, "shrinkA": 0, "shrinkB": 0}
    axes.annotate("", stop, start, arrowprops=look)


def draw_branch(axes: Axes, index: int) -> None:
    """Image, blocks and the arrow into the merging of one branch."""
    branch, y, photo = CONFIG.branches[index], ROWS[index], data.chelsea()[:, 60:360]
    side, width = branch.image_size / 1568 * 2.3, branch.network.embed_dim
    axes.imshow(photo, extent=(2.5 - side, 2.5, y - side / 2, y + side / 2), interpolation="antialiased", zorder=2)
    axes.add_patch(Rectangle((2.5 - side, y - side / 2), side, side, fill=False, ec=COLOURS[index], lw=2.5, zorder=3))
    axes.text(2.62, y + 0.12, f"{branch.image_size}²", color=COLOURS[index], fontsize=11, weight="bold", va="bottom")
    arrow(axes, (2.6, y), (SEGMENTS[0] - 0.06, y))
    for number, x in enumerate(SEGMENTS):
        box(axes, x, y, WIDTH, width / 768 * 1.5, COLOURS[index], f"ViT-{SIZES[width]}" if number == 0 else "")
        end = SEGMENTS[number + 1] if number + 1 < len(SEGMENTS) else 10.4
        arrow(axes, (x + WIDTH, y), (end - 0.06, y))


def draw() -> Figure:
    """The whole figure."""
    figure = Figure(figsize=(13, 6.6), layout="tight")
    axes = figure.add_subplot()
    for index in range(len(CONFIG.branches)):
        draw_branch(axes, index)
    for x in SEGMENTS:
        for upper, lower in pairwise(ROWS):
            arrow(axes, (x + WIDTH + 0.22, upper), (x + WIDTH + 0.22, lower), EXCHANGE, "<->")
    middle, height = (ROWS[0] + ROWS[-1]) / 2, ROWS[0] - ROWS[-1] + 1.5
    box(axes, 10.4, middle, 0.5, height, INK)
    axes.text(
        10.65, middle, "merging", rotation=90, ha="center", va="center", color="white", fontsize=11, weight="bold"
    )
    for stride, y in zip(CONFIG.merging.out_strides, (1.6, 3.25, 4.35, 5.2), strict=True):
        side = 1.5 * 2 ** (-0.6 * (stride.bit_length() - 3))
        arrow(axes, (10.9, y), (11.4, y))
        axes.add_patch(Rectangle((11.45, y - side / 2), side, side, fc="#e4e4e4", ec=INK))
        axes.text(11.45 + side + 0.1, y, f"1/{stride}", va="center", fontsize=10, color=INK)
    for x, text in ((1.35, "image pyramid"), (6.85, "branches"), (12.1, "feature maps")):
        axes.text(x, 6.45, text, ha="center", fontsize=13, color=INK, weight="bold")
    text = f"interactions: deformable cross-attention, both ways ({CONFIG.num_interactions} of them, four drawn)"
    axes.text(6.85, 0.35, text, ha="center", fontsize=11, color=EXCHANGE)
    axes.set(xlim=(0, 13.6), ylim=(0, 6.8), aspect="equal")
    axes.axis("off")
    return figure


if __name__ == "__main__":
    draw().savefig(OUTPUT, dpi=90, pil_kwargs={"optimize": True})
