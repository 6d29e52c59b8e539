"""Figures of what a `Trace` holds."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.patches import Rectangle

from .scene import Cells, Scene
from .spectrum import Spectrum
from .trace import BlockView, Reading, Trace

__all__ = ["branch_colour", "draw_attention", "draw_sampling", "draw_spectra"]

_BRANCH_COLOURS = ("#c0272d", "#e08a00", "#0b7d8c", "#4a3fb5")  # Branch 1 first; more branches start again
_QUERY = "#00e5ff"
_HEAT = colormaps["inferno"]
_PANEL = 3.3  # inches, the longer side of a picture


def branch_colour(number: int) -> str:
    """Colour of a branch, by its number from 1, in all figures."""
    return _BRANCH_COLOURS[(number - 1) % len(_BRANCH_COLOURS)]


def draw_attention(scene: Scene, trace: Trace, title: str) -> Figure:
    """Self-attention of the query in one block of every branch, mean over the heads, beside the picture.

    The colours of a map run from its smallest to its largest weight, which stand in the caption. What lies outside of
    the window is dark. A block without attention shows the energy of its features instead.
    """
    width, height = _panel_size(scene)
    columns = len(trace.views) + 1
    figure = Figure(figsize=(columns * width + 0.2, height + 0.78), layout="constrained", dpi=120)
    figure.suptitle(title, fontsize=12)
    panels = figure.subplots(1, columns)
    _show_picture(panels[0], scene)
    _mark(panels[0], *scene.query)
    _caption(panels[0], "query", f"pixel {scene.query_pixel[0]}, {scene.query_pixel[1]} of the image")
    for axes, view in zip(panels[1:], trace.views, strict=True):
        (_draw_energy if view.attention is None else _draw_attention_map)(axes, scene, view)
    return figure


def draw_sampling(scene: Scene, trace: Trace, title: str) -> Figure:
    """What the query reads in each direction of the interaction: on the picture, and below around the query.

    Points of deformable attention are coloured and sized by weight, those of all heads together; the fine lines are the
    cells of the map that is read. Regular attention reads every cell: the mean over the heads is shown as in
    `draw_attention`.
    """
    width, height = _panel_size(scene)
    columns = len(trace.readings)
    figure = Figure(figsize=(columns * width + 0.9, 2 * height + 0.9), layout="constrained", dpi=120)
    figure.suptitle(title, fontsize=12)
    panels = figure.subplots(2, columns, squeeze=False)
    pointed = [reading for reading in trace.readings if reading.points is not None]
    largest = max((float(reading.weights.max()) for reading in pointed), default=1.0)
    scale = Normalize(0, largest)
    for (whole, near), reading in zip(panels.T, trace.readings, strict=True):
        view = _neighbourhood(reading, scene)
        for axes in (whole, near):
            _show_picture(axes, scene, grey=True, dim=0.85)
        if reading.points is None:
            for axes in (whole, near):
                _overlay(axes, scene, reading.weights.mean(dim=0).numpy(), reading.cells)
            text = f"regular attention, {len(reading.weights)} heads"
        else:
            _scatter(whole, reading, scale, size=26)
            _scatter(near, reading, scale, size=100)
            text = _points_text(reading, scene)
        _draw_cells(near, reading.cells, view)
        for axes in (whole, near):
            _mark(axes, *reading.at, small=axes is whole)
        left, top, right, bottom = view
        whole.add_patch(Rectangle((left, top), right - left, bottom - top, fill=False, edgecolor="white", linewidth=1))
        _limit(whole, scene)
        near.set(xlim=(left, right), ylim=(bottom, top))
        _caption(whole, f"Branch {reading.reader} reads Branch {reading.source}", text, branch_colour(reading.reader))
    if pointed:
        bar = figure.colorbar(ScalarMappable(scale, _HEAT), ax=panels[:, -1], fraction=0.05, pad=0.03, aspect=30)
        bar.set_label("attention weight within the head")
    return figure


def draw_spectra(scene: Scene, trace: Trace, title: str) -> Figure:
    """Fourier spectra: curves per branch on two frequency axes, over the depth, and over both axes of the map."""
    branches = range(1, len(trace.depth) + 1)
    figure = Figure(figsize=(13.2, 7.0), layout="constrained", dpi=110)
    figure.suptitle(title, fontsize=12)
    upper, lower = figure.subfigures(2, 1, height_ratios=(1.25, 1))
    own, absolute, depth = upper.subplots(1, 3)
    shown = trace.after or tuple(spectra[-1] for spectra in trace.depth)
    place = "behind the last block" if trace.interaction is None else f"around interaction {trace.interaction}"
    long_side = max(scene.size)
    for number, spectrum, cells in zip(branches, shown, trace.cells, strict=True):
        cycles = 0.5 * long_side / max(cells.size)
        curves = [(spectrum, "-", f"Branch {number}" + (", after" if trace.before else ""))]
        if trace.before:
            curves.insert(0, (trace.before[number - 1], (0, (4, 2)), f"Branch {number}, before"))
        for curve, style, label in curves:
            line = {"color": branch_colour(number), "linestyle": style, "label": label}
            own.plot(curve.frequencies, curve.log_amplitudes, **line)
            absolute.plot(curve.frequencies * cycles, curve.log_amplitudes, **line)
        spectra = trace.depth[number - 1]
        share = (np.arange(len(spectra)) + 1) / len(spectra)
        ends = [float(spectrum.log_amplitudes[-1]) for spectrum in spectra]
        depth.plot(share, ends, "o-", color=branch_colour(number), markersize=3.5, label=f"Branch {number}")
    own.set(xlabel="frequency / highest of the branch's map (π)", ylabel="relative log amplitude", title=place)
    absolute.set(xlabel="cycles along the longer side of the picture", title="the same, by size on the picture")
    depth.set(xlabel="depth of the block / depth of the branch", title="highest frequency (1.0 π), per block")
    for axes in (own, absolute, depth):
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    own.legend(fontsize=8, ncols=2 if trace.before else 1)
    depth.legend(fontsize=8)
    _draw_planes(lower, shown)
    return figure


def _draw_attention_map(axes: Axes, scene: Scene, view: BlockView) -> None:
    row, cells = view.attention, view.cells
    weights = row.weights.mean(dim=0).numpy()
    top, left, bottom, right = row.window
    seen = weights[top:bottom, left:right]
    facts = [f"weights {_percent(seen.min())} to {_percent(seen.max())}"]
    facts += [
        f"{share:.0%} on {what}"
        for share, what in (
            (float(row.prefix.sum(dim=1).mean()), "class tokens"),
            (float(row.padding.mean()), "window padding"),
        )
        if share >= 0.005
    ]
    _overlay(axes, scene, weights, cells, row.window)
    if view.window is None:
        reach = f"global, {cells.rows} x {cells.columns}"
    else:
        reach = f"window {view.window} x {view.window}"
        _frame(axes, cells, row.window, "white")
    row_, column = view.cell
    _frame(axes, cells, (row_, column, row_ + 1, column + 1), _QUERY)
    _caption(axes, f"Branch {view.branch}, block {view.block}: {reach}", ", ".join(facts), branch_colour(view.branch))


def _draw_energy(axes: Axes, scene: Scene, view: BlockView) -> None:
    energy = view.energy.numpy()
    _overlay(axes, scene, energy.clip(*np.quantile(energy, (0.02, 0.98))), view.cells)
    title = f"Branch {view.branch}, block {view.block}: {view.cells.rows} x {view.cells.columns}"
    _caption(axes, title, "no attention: activation energy", branch_colour(view.branch))


def _overlay(
    axes: Axes,
    scene: Scene,
    weights: np.ndarray,
    cells: Cells,
    window: tuple[int, int, int, int] | None = None,
) -> None:
    """Lays weights over the picture as heat, from the smallest to the largest; outside of the window it is dark."""
    top, left, bottom, right = window or (0, 0, cells.rows, cells.columns)
    seen = weights[top:bottom, left:right]
    strength = ((seen - seen.min()) / max(np.ptp(seen), 1e-30)) ** 0.8
    rgba = _HEAT(0.15 + 0.85 * strength)
    rgba[..., 3] = 0.3 + 0.5 * strength
    height, width = cells.size
    box = (left * width, right * width, bottom * height, top * height)
    _show_picture(axes, scene, grey=True, dim=0.35)
    lit = _show_picture(axes, scene, grey=True)
    corner = Rectangle((box[0], box[3]), box[1] - box[0], box[2] - box[3], transform=axes.transData)
    lit.set_clip_path(corner)
    axes.imshow(rgba, extent=box, interpolation="nearest")
    _limit(axes, scene)


def _percent(share: float) -> str:
    return f"{share:.2%}" if share < 0.1 else f"{share:.0%}"


def _scatter(axes: Axes, reading: Reading, scale: Normalize, size: float) -> None:
    weights = reading.weights.flatten().numpy()
    order = np.argsort(weights)  # the heaviest on top
    x, y = reading.points.flatten(0, 1).numpy()[order].T
    share = weights[order] / scale.vmax
    colours, areas = _HEAT(share), size * (0.15 + 0.85 * share)
    axes.scatter(x, y, s=areas, c=colours, edgecolors="white", linewidths=0.6, zorder=3)


def _points_text(reading: Reading, scene: Scene) -> str:
    heads, points = reading.weights.shape
    height, width = scene.size
    x, y = reading.points.unbind(-1)
    off = int(((x < 0) | (y < 0) | (x > width) | (y > height)).sum())
    return f"{heads} heads of {points} points" + (f", {off} outside of the picture" if off else "")


def _neighbourhood(reading: Reading, scene: Scene) -> tuple[float, float, float, float]:
    """Left, top, right, bottom of the part around the query that is shown large, in the picture's proportions."""
    height, width = scene.size
    x, y = reading.at
    reach = 5.5 * max(reading.cells.size)
    if reading.points is not None:
        # The farthest points may be anywhere: nine in ten are enough, and the picture above has the rest
        distance = (reading.points - reading.points.new_tensor(reading.at)).abs().amax(dim=-1)
        reach = max(reach, 1.15 * float(distance.flatten().quantile(0.9)))
    share = min(2 * reach / min(height, width), 1.0)
    half_width, half_height = width * share / 2, height * share / 2
    x, y = min(max(x, half_width), width - half_width), min(max(y, half_height), height - half_height)
    return x - half_width, y - half_height, x + half_width, y + half_height


def _draw_planes(figure: Figure, spectra: Sequence[Spectrum]) -> None:
    panels = figure.subplots(1, max(len(spectra), 3))
    for unused in panels[len(spectra) :]:
        unused.set_axis_off()
    # One colour scale for all; without the few frequencies that hardly occur
    scale = Normalize(min(float(spectrum.plane.quantile(0.02)) for spectrum in spectra), 0.0)
    for number, (axes, spectrum) in enumerate(zip(panels, spectra, strict=False), 1):
        rows, columns = spectrum.plane.shape
        (left, right), (top, bottom) = ((-(2 * (n // 2) + 1) / n, (2 * (n - n // 2) - 1) / n) for n in (columns, rows))
        extent = (left, right, bottom, top)
        axes.imshow(spectrum.plane, extent=extent, cmap="magma", norm=scale, aspect="auto", interpolation="nearest")
        axes.set_box_aspect(1)
        axes.set_title(f"Branch {number}: {rows} x {columns} cells", color=branch_colour(number), fontsize=10)
        axes.set(xticks=(-1, 0, 1), xticklabels=("-π", "0", "π"), yticks=(-1, 0, 1), yticklabels=("-π", "0", "π"))
        axes.set(xlim=(left, 1), ylim=(1, top), facecolor="black")  # of an even side, one half of the highest is shown
    bar = figure.colorbar(ScalarMappable(scale, "magma"), ax=list(panels), fraction=0.03)
    bar.set_label("relative log amplitude")


def _draw_cells(axes: Axes, cells: Cells, view: tuple[float, float, float, float]) -> None:
    left, top, right, bottom = view
    lines = ((cells.size[1], left, right, axes.axvline), (cells.size[0], top, bottom, axes.axhline))
    for size, low, high, draw in lines:
        if (high - low) / size <= 60:  # more would hide the picture
            for k in range(int(np.ceil(low / size)), int(high / size) + 1):
                draw(k * size, color="white", linewidth=0.4, alpha=0.35)


def _show_picture(axes: Axes, scene: Scene, *, grey: bool = False, dim: float = 1.0) -> AxesImage:
    height, width = scene.size
    pixels = scene.picture.astype(np.float32) / 255
    if grey:
        pixels = np.repeat((pixels @ np.float32((0.299, 0.587, 0.114)))[..., None], 3, axis=2) * np.float32(dim)
    shown = axes.imshow(pixels, extent=(0, width, height, 0), interpolation="bilinear")
    axes.set_axis_off()
    _limit(axes, scene)
    return shown


def _limit(axes: Axes, scene: Scene) -> None:
    """Shows the picture without padding."""
    height, width = scene.size
    axes.set(xlim=(0, width), ylim=(height, 0))


def _mark(axes: Axes, x: float, y: float, *, small: bool = False) -> None:
    """A cross that is seen on any ground."""
    size = 7 if small else 11
    axes.plot(x, y, "+", color="black", markersize=size + 2, markeredgewidth=3.2, zorder=4)
    axes.plot(x, y, "+", color=_QUERY, markersize=size, markeredgewidth=1.6, zorder=5)


def _frame(axes: Axes, cells: Cells, box: tuple[int, int, int, int], colour: str) -> None:
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
