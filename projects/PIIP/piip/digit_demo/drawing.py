"""Predictions of a demo run beside the ground truth, from the files that the training wrote."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib import colormaps
from matplotlib.figure import Figure

from piip.charts import write_figure

_COLOURS = colormaps["tab10"].colors  # one per digit, the same in ground truth and prediction
_SCORE = 0.5  # predictions below it are not drawn


def draw_predictions(path: Path, title: str, annotations: Path, images: Path, results: Path, count: int = 12) -> None:
    """Draws images of a COCO annotation file in pairs, ground truth left and predictions in COCO's result format right.

    They are spread evenly over the file; none is chosen for how it came out.
    """
    from piip.data import read_image  # Detectron2, without which the classifier runs

    truth = json.loads(annotations.read_text())
    names = {category["id"]: category["name"] for category in truth["categories"]}
    found = [entry for entry in json.loads(results.read_text()) if entry["score"] >= _SCORE]
    count = min(count, len(truth["images"]))
    columns = min(3, count)
    rows = -(-count // columns)
    figure = Figure(figsize=(columns * 5.2, rows * 2.9 + 0.6), layout="constrained", dpi=110)
    figure.suptitle(title)
    panels = figure.subplots(rows, 2 * columns, squeeze=False)
    for axes in panels.flat:
        axes.set_axis_off()
    for i, (left, right) in enumerate(panels.reshape(-1, 2)[:count]):
        image = truth["images"][i * len(truth["images"]) // count]
        pixels = read_image(str(images / image["file_name"]))
        for axes, entries, caption in ((left, truth["annotations"], "ground truth"), (right, found, "predicted")):
            shown = [entry for entry in entries if entry["image_id"] == image["id"]]
            axes.imshow(_draw_objects(pixels, shown, names))
            axes.set_title(f"{caption}: {len(shown)} digits", fontsize=9)
    write_figure(figure, path)


def _draw_objects(image: np.ndarray, entries: Sequence[Mapping], names: Mapping[int, str]) -> np.ndarray:
    """Draws masks, boxes and labels of COCO annotations or results."""
    from detectron2.utils.visualizer import Visualizer

    labels = [names[e["category_id"]] + (f" {e['score']:.0%}" if "score" in e else "") for e in entries]
    boxes = [[x, y, x + width, y + height] for x, y, width, height in (entry["bbox"] for entry in entries)]
    masks = [entry["segmentation"] for entry in entries]
    colours = [_COLOURS[(entry["category_id"] - 1) % len(_COLOURS)] for entry in entries]
    canvas = Visualizer(image, scale=2)
    return canvas.overlay_instances(boxes=boxes, masks=masks, labels=labels, assigned_colors=colours).get_image()
