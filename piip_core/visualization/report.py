"""All figures of one model and image, with a JSON file that says what is on them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch import nn

from ..files import atomic_path, write_atomically
from .drawing import draw_attention, draw_sampling, draw_spectra
from .scene import Scene
from .spectrum import Spectrum
from .trace import BlockView, Trace, find_pyramid, trace_pyramid

__all__ = ["visualize"]


def visualize(
    model: nn.Module,
    scene: Scene,
    output: Path | str,
    *,
    name: str,
    **options: Any,
) -> list[Path]:
    """Draws attention.png, sampling.png (models with interactions) and spectra.png, and writes visualization.json.

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
    figures["spectra.png"] = draw_spectra(scene, trace, f"{name}: Fourier spectra of the features")
    output = Path(output)
    output.mkdir(parents=True, exist_ok=True)
    for file, figure in figures.items():
        with atomic_path(output / file) as aside:
            figure.savefig(aside, format="png")
    with write_atomically(output / "visualization.json", "w") as file:
        json.dump({"model": name, "files": list(figures), **_describe(scene, trace)}, file, indent=2)
    return [output / file for file in (*figures, "visualization.json")]


def _describe(scene: Scene, trace: Trace) -> dict[str, Any]:
    """What the figures show, as plain data. Sizes are height and width; points are x and y."""
    return {
        "image_size": list(scene.original_size),
        "resized_to": list(scene.size),
        "padded_to": list(scene.pixel_values.shape[-2:]),
        "query": list(scene.query_pixel),
        "interaction": trace.interaction,
        "attention": [_describe_view(view) for view in trace.views],
        "sampling": [
            {
                "reader": reading.reader,
                "source": reading.source,
                "map_size": [reading.cells.rows, reading.cells.columns],
                "reference": list(reading.at),
                "points": None if reading.points is None else reading.points.tolist(),
                "weights": None if reading.points is None else reading.weights.tolist(),
            }
            for reading in trace.readings
        ],
        "spectra": {
            "before": [_describe_spectrum(spectrum) for spectrum in trace.before],
            "after": [_describe_spectrum(spectrum) for spectrum in trace.after],
            "highest_frequency_per_block": [
                [round(float(spectrum.log_amplitudes[-1]), 5) for spectrum in spectra] for spectra in trace.depth
            ],
        },
    }


def _describe_view(view: BlockView) -> dict[str, Any]:
    found = {
        "branch": view.branch,
        "block": view.block,
        "map_size": [view.cells.rows, view.cells.columns],
        "query_cell": list(view.cell),
        "window": view.window,
        "shown": "activation energy" if view.attention is None else "attention",
    }
    if view.attention is not None:
        found["heads"] = len(view.attention.weights)
        found["seen_cells"] = list(view.attention.window)
        found["highest_weight"] = float(view.attention.weights.mean(dim=0).max())
        found["on_prefix_tokens"] = float(view.attention.prefix.sum(dim=1).mean())
        found["on_window_padding"] = float(view.attention.padding.mean())
    return found


def _describe_spectrum(spectrum: Spectrum) -> dict[str, list[float]]:
    return {
        "frequencies": [round(value, 5) for value in spectrum.frequencies.tolist()],
        "log_amplitudes": [round(value, 5) for value in spectrum.log_amplitudes.tolist()],
    }
