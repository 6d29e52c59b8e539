"""Figures of what a forward pass showed, and a JSON file that says what is on them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.patches import Rectangle
from torch import Tensor, nn

from ..files import atomic_path, write_atomically
from .scene import Box, Cells, Scene
from .trace import BlockView, Reading, Trace, find_pyramid, trace_pyramid

_BRANCH_COLOURS = ("#c0272d", "#e08a00", "#0b7d8c", "#4a3fb5")  # Branch 1 first; more branches start again
_QUERY = "#00e5ff"
_HEAT = colormaps["inferno"]
_PANEL = 3.3  # inches, the longer side of an image


def branch_colour(number: int) -> str:
    """Colour of a branch, by its number from 1, in all figures."""
    return _BRANCH_COLOURS[(number - 1) % len(_BRANCH_COLOURS)]


def draw_attention(scene: Scene, trace: Trace, title: str) -> Figure:
    """Self-attention of the query in one block of every branch, mean over the heads, beside the image.

    The colours of a map run from its smallest to its largest weight, which stand in the caption. What lies outside of
    the window is dark. A block without attention shows the energy of its features instead.
    """
    width, height = _panel_size(scene)
    columns = len(trace.views) + 1
    figure = _new_figure((columns * width + 0.2, height + 0.78), title)
    panels = figure.subplots(1, columns)
    _show_image(panels[0], scene)
    _mark(panels[0], scene.query, 11)
    _caption(panels[0], "query", f"pixel {scene.query_pixel[0]}, {scene.query_pixel[1]} of the image")
    for axes, view in zip(panels[1:], trace.views, strict=True):
        _draw_view(axes, scene, view)
    return figure


def draw_sampling(scene: Scene, trace: Trace, title: str) -> Figure:
    """What the query reads in each direction of the interaction: on the image, and below around the query.

    Points of deformable attention are coloured and sized by weight, those of all heads together; the fine lines are the
    cells of the map that is read. Regular attention reads every cell: the mean over the heads is shown as in
    `draw_attention`.
    """
    width, height = _panel_size(scene)
    figure = _new_figure((len(trace.readings) * width + 0.9, 2 * height + 0.9), title)
    panels = figure.subplots(2, len(trace.readings), squeeze=False)
    pointed = [reading for reading in trace.readings if reading.points is not None]
    scale = Normalize(0, max((float(reading.weights.max()) for reading in pointed), default=1.0))
    for (whole, near), reading in zip(panels.T, trace.readings, strict=True):
        left, top, right, bottom = _neighbourhood(reading, scene)
        for axes, area, cross in ((whole, 26, 7), (near, 100, 11)):
            _show_image(axes, scene, grey=True, dim=0.85)
            if reading.points is None:
                _overlay(axes, scene, reading.weights.mean(dim=0).numpy(), reading.cells)
            else:
                _scatter(axes, reading.points, reading.weights, scale, area)
            _mark(axes, reading.at, cross)
        whole.add_patch(Rectangle((left, top), right - left, bottom - top, fill=False, edgecolor="white", linewidth=1))
        near.set(xlim=(left, right), ylim=(bottom, top))
        _draw_cells(near, reading.cells)
        direction = f"Branch {reading.reader} reads Branch {reading.source}"
        _caption(whole, direction, _describe_reading(reading, scene), branch_colour(reading.reader))
    if pointed:
        bar = figure.colorbar(ScalarMappable(scale, _HEAT), ax=panels[:, -1], fraction=0.05, pad=0.03, aspect=30)
        bar.set_label("attention weight within the head")
    return figure


def draw_spectra(trace: Trace, title: str) -> Figure:
    """Fourier spectra: curves of every branch around the interaction, and its highest frequency over the depth."""
    figure = _new_figure((9.0, 4.2), title, dpi=110)
    curves, depth = figure.subplots(1, 2)
    place = "after the last block" if trace.interaction is None else f"around interaction {trace.interaction}"
    for number, spectra in enumerate(trace.depth, 1):
        shown = {"": spectra[-1]}
        if trace.interaction is not None:
            shown = {", before": trace.before[number - 1], ", after": trace.after[number - 1]}
        for when, curve in shown.items():
            style = {"linestyle": (0, (4, 2)) if when == ", before" else "-", "color": branch_colour(number)}
            curves.plot(np.linspace(0, 1, len(curve)), curve, label=f"Branch {number}{when}", **style)
        share = (np.arange(len(spectra)) + 1) / len(spectra)
        ends = [float(spectrum[-1]) for spectrum in spectra]
        depth.plot(share, ends, "o-", color=branch_colour(number), markersize=3.5, label=f"Branch {number}")
    curves.set(xlabel="frequency / highest of the branch's map (π)", ylabel="relative log amplitude", title=place)
    depth.set(xlabel="depth of the block / depth of the branch", title="highest frequency (1.0 π), per block")
    for axes in (curves, depth):
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    curves.legend(fontsize=8, ncols=2 if trace.before else 1)
    depth.legend(fontsize=8)
    return figure


def visualize(model: nn.Module, scene: Scene, output: Path | str, *, name: str, **options: Any) -> list[Path]:
    """Draws attention.png, sampling.png (models with interactions) and spectra.png, and writes visualization.json.

    The last holds the `Trace` by the names of its fields; sizes are height and width, points x and y.

    Args:
        model: With one PIIP inside, in evaluation mode.
        scene: The image and the query.
        output: Folder of the files.
        name: What the titles call the model; also say there where its weights are from.
        options: Of `trace_pyramid`.

    Returns:
        The files.

    Raises:
        UserError: If model, block or interaction are not as described.
    """
    trace = trace_pyramid(find_pyramid(model), scene, **options)
    figures = {"attention.png": draw_attention(scene, trace, f"{name}: self-attention of the query, mean over heads")}
    if trace.readings:
        title = f"{name}: what the query reads in interaction {trace.interaction}"
        figures["sampling.png"] = draw_sampling(scene, trace, title)
    figures["spectra.png"] = draw_spectra(trace, f"{name}: Fourier spectra of the features")
    output = Path(output)
    output.mkdir(parents=True, exist_ok=True)
    for figure_name, figure in figures.items():
        with atomic_path(output / figure_name) as aside:
            figure.savefig(aside, format="png")
    facts = {
        "model": name,
        "files": list(figures),
        "image_size": scene.original_size,
        "resized_to": scene.size,
        "padded_to": scene.pixel_values.shape[-2:],
        "query": scene.query_pixel,
        **vars(trace),
    }
    with write_atomically(output / "visualization.json", "w") as file:
        json.dump(facts, file, default=lambda part: part.tolist() if isinstance(part, Tensor) else vars(part))
    return [output / file for file in (*figures, "visualization.json")]


def _new_figure(size: tuple[float, float], title: str, dpi: int = 120) -> Figure:
    figure = Figure(figsize=size, layout="constrained", dpi=dpi)
    figure.suptitle(title, fontsize=12)
    return figure


def _draw_view(axes: Axes, scene: Scene, view: BlockView) -> None:
    cells, attention = view.cells, view.attention
    if attention is None:
        energy = view.energy.numpy()
        _overlay(axes, scene, energy.clip(*np.quantile(energy, (0.02, 0.98))), cells)
        reach, text = f"{cells.rows} x {cells.columns}", "no attention: activation energy"
    else:
        weights = attention.weights.mean(dim=0).numpy()
        _overlay(axes, scene, weights, cells, attention.window)
        reach = f"global, {cells.rows} x {cells.columns}"
        if view.window is not None:
            reach = f"window {view.window[0]} x {view.window[1]}"
            _frame(axes, cells, attention.window, "white")
        row, column = view.cell
        _frame(axes, cells, (row, column, row + 1, column + 1), _QUERY)
        top, left, bottom, right = attention.window
        seen = weights[top:bottom, left:right]
        text = f"weights {_percent(seen.min())} to {_percent(seen.max())}"
        elsewhere = {"class tokens": attention.prefix.sum(dim=1), "window padding": attention.padding}
        for name, shares in elsewhere.items():
            if float(shares.mean()) >= 0.005:
                text += f", {float(shares.mean()):.0%} on {name}"
    _caption(axes, f"Branch {view.branch}, block {view.block}: {reach}", text, branch_colour(view.branch))


def _overlay(axes: Axes, scene: Scene, weights: np.ndarray, cells: Cells, window: Box | None = None) -> None:
    """Lays weights over the image as heat, from the smallest to the largest; outside of the window it is dark."""
    top, left, bottom, right = window or (0, 0, cells.rows, cells.columns)
    seen = weights[top:bottom, left:right]
    strength = ((seen - seen.min()) / max(np.ptp(seen), 1e-30)) ** 0.8
    rgba = _HEAT(0.15 + 0.85 * strength)
    rgba[..., 3] = 0.3 + 0.5 * strength
    height, width = cells.size
    x, y = left * width, top * height
    corner = Rectangle((x, y), (right - left) * width, (bottom - top) * height, transform=axes.transData)
    _show_image(axes, scene, grey=True, dim=0.35)
    _show_image(axes, scene, grey=True).set_clip_path(corner)
    axes.imshow(rgba, extent=(x, right * width, bottom * height, y), interpolation="nearest")


def _percent(share: float) -> str:
    return f"{share:.2%}" if share < 0.1 else f"{share:.0%}"


def _scatter(axes: Axes, points: Tensor, weights: Tensor, scale: Normalize, area: float) -> None:
    shares = weights.flatten().numpy() / scale.vmax
    order = np.argsort(shares)  # the heaviest on top
    x, y = points.flatten(0, 1).numpy()[order].T
    share = shares[order]
    sizes = area * (0.15 + 0.85 * share)
    axes.scatter(x, y, s=sizes, c=_HEAT(share), edgecolors="white", linewidths=0.6, zorder=3)


def _describe_reading(reading: Reading, scene: Scene) -> str:
    if reading.points is None:
        return f"regular attention, {len(reading.weights)} heads"
    heads, points = reading.weights.shape
    height, width = scene.size
    x, y = reading.points.unbind(-1)
    off = int(((x < 0) | (y < 0) | (x > width) | (y > height)).sum())
    return f"{heads} heads of {points} points" + (f", {off} outside of the image" if off else "")


def _neighbourhood(reading: Reading, scene: Scene) -> tuple[float, float, float, float]:
    """Left, top, right, bottom of the part around the query that is shown large, in the image's proportions."""
    height, width = scene.size
    x, y = reading.at
    reach = 5.5 * max(reading.cells.size)
    if reading.points is not None:
        # The farthest points may be anywhere: nine in ten are enough, and the image above has the rest
        distance = (reading.points - reading.points.new_tensor(reading.at)).abs().amax(dim=-1)
        reach = max(reach, 1.15 * float(distance.flatten().quantile(0.9)))
    share = min(2 * reach / min(height, width), 1.0)
    half_width, half_height = width * share / 2, height * share / 2
    x, y = min(max(x, half_width), width - half_width), min(max(y, half_height), height - half_height)
    return x - half_width, y - half_height, x + half_width, y + half_height


def _draw_cells(axes: Axes, cells: Cells) -> None:
    """Lines between the cells that are shown."""
    (left, right), (bottom, top) = axes.get_xlim(), axes.get_ylim()
    height, width = cells.size
    for size, low, high, draw in ((width, left, right, axes.axvline), (height, top, bottom, axes.axhline)):
        if (high - low) / size <= 60:  # more would hide the image
            for k in range(int(np.ceil(low / size)), int(high / size) + 1):
                draw(k * size, color="white", linewidth=0.4, alpha=0.35)


def _show_image(axes: Axes, scene: Scene, *, grey: bool = False, dim: float = 1.0) -> AxesImage:
    """Shows the image without padding, whatever is drawn on it later."""
    height, width = scene.size
    pixels = scene.image.astype(np.float32) / 255
    if grey:
        luminance = pixels @ np.array((0.299, 0.587, 0.114), np.float32)
        pixels = np.repeat(luminance[..., None], 3, axis=2) * np.float32(dim)
    shown = axes.imshow(pixels, extent=(0, width, height, 0), interpolation="bilinear")
    axes.set_axis_off()
    axes.set(xlim=(0, width), ylim=(height, 0))
    return shown


def _mark(axes: Axes, point: tuple[float, float], size: float) -> None:
    """A cross that is seen on any ground."""
    axes.plot(*point, "+", color="black", markersize=size + 2, markeredgewidth=3.2, zorder=4)
    axes.plot(*point, "+", color=_QUERY, markersize=size, markeredgewidth=1.6, zorder=5)


def _frame(axes: Axes, cells: Cells, box: Box, colour: str) -> None:
    top, left, bottom, right = box
    height, width = cells.size
    corner, size = (left * width, top * height), ((right - left) * width, (bottom - top) * height)
    axes.add_patch(Rectangle(corner, *size, fill=False, edgecolor=colour, linewidth=1.2))


def _caption(axes: Axes, title: str, text: str, colour: str = "black") -> None:
    axes.set_title(title, color=colour, fontsize=10, weight="bold", pad=17)
    axes.text(0.5, 1.02, text, transform=axes.transAxes, ha="center", va="bottom", fontsize=8.5, color="#333333")


def _panel_size(scene: Scene) -> tuple[float, float]:
    """Width and height of a panel in inches."""
    height, width = scene.size
    return _PANEL * width / max(height, width), _PANEL * height / max(height, width)
