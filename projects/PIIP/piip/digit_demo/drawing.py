"""Images of a demo run: predictions beside the ground truth, and curves.

Everything is drawn from files that the training wrote (COCO annotations, COCO results, the JSON lines of Detectron2's
writer), so nothing here needs a model or Detectron2.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from PIL import Image
from pycocotools import mask as coco_mask

from piip_core.files import atomic_path

__all__ = ["draw_classified", "draw_curves", "draw_predictions", "read_metrics"]

_COLOURS = colormaps["tab10"].colors  # one per digit, the same in ground truth and prediction
_SCORE = 0.5  # predictions below it are not drawn

Curves = Mapping[str, tuple[Sequence[float], Sequence[float]]]
"""Steps and values by the name of what was measured."""


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


def draw_curves(
    path: Path, title: str, losses: Curves, scores: Curves, score_label: str, step_label: str = "iteration"
) -> None:
    """Draws losses (left) and scores in percent (right) over the steps."""
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    figure.suptitle(title)
    left, right = figure.subplots(1, 2)
    for index, (name, (steps, values)) in enumerate(losses.items()):
        left.plot(steps, values, label=name, linewidth=2.0 if index == 0 else 1.0)
    left.set(xlabel=step_label, ylabel="loss", ylim=(0, None))
    for index, (name, (steps, values)) in enumerate(scores.items()):
        right.plot(steps, values, "o-", label=name, color=f"C{index}")
        place = dict(textcoords="offset points", xytext=(6, 0), va="center")
        right.annotate(f"{values[-1]:.1f}", (steps[-1], values[-1]), color=f"C{index}", weight="bold", **place)
    right.set(xlabel=step_label, ylabel=score_label, ylim=(0, 100))
    right.margins(x=0.12)
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.legend()
    _write(figure, path)


def draw_predictions(path: Path, title: str, annotations: Path, images: Path, results: Path, count: int = 12) -> None:
    """Draws validation images in pairs, ground truth left and prediction right.

    The images are spread evenly over the annotation file; none is chosen for how it came out.

    Args:
        path: File to write.
        title: Text above the images.
        annotations: COCO annotation file.
        images: Folder of the images.
        results: Predictions in COCO's result format (`coco_instances_results.json` of Detectron2's evaluator).
        count: Number of pairs.
    """
    truth = json.loads(annotations.read_text())
    names = {category["id"]: category["name"] for category in truth["categories"]}
    found = [entry for entry in json.loads(results.read_text()) if entry["score"] >= _SCORE]
    count = min(count, len(truth["images"]))
    pairs_per_row = min(3, count)
    rows = -(-count // pairs_per_row)
    figure = Figure(figsize=(pairs_per_row * 5.2, rows * 2.85 + 0.6), layout="constrained", dpi=110)
    figure.suptitle(title, fontsize=15)
    panels = figure.subplots(rows, 2 * pairs_per_row, squeeze=False)
    for axes in panels.flat:
        axes.set_axis_off()
    for i, pair in enumerate(panels.reshape(-1, 2)[:count]):
        image = truth["images"][i * len(truth["images"]) // count]
        expected, predicted = (
            [entry for entry in entries if entry["image_id"] == image["id"]]
            for entries in (truth["annotations"], found)
        )
        right = _count_matches(expected, predicted)
        numbers = {"missed": len(expected) - right, "wrong": len(predicted) - right}
        verdict = "".join(f", {number} {word}" for word, number in numbers.items() if number)
        titles = (f"ground truth: {len(expected)} digits", f"predicted: {right} right{verdict}")
        for axes, entries, caption in zip(pair, (expected, predicted), titles, strict=True):
            with Image.open(images / image["file_name"]) as opened:
                axes.imshow(opened.convert("RGB"), interpolation="bilinear")
            axes.set_title(caption, fontsize=9)
            for entry in entries:
                score = f"  {entry['score']:.0%}" if "score" in entry else ""
                _draw_instance(axes, entry, names[entry["category_id"]] + score)
    _write(figure, path)


def draw_classified(
    path: Path, title: str, images: np.ndarray, labels: Sequence[int], predicted: Sequence[int]
) -> None:
    """Draws images (N, H, W, 3) with the predicted class below, green if right and red if not."""
    columns = 8
    rows = -(-len(images) // columns)
    figure = Figure(figsize=(columns * 1.25, rows * 1.5 + 0.5), layout="constrained")
    figure.suptitle(title)
    panels = figure.subplots(rows, columns, squeeze=False)
    for axes in panels.flat:
        axes.set_axis_off()
    for axes, image, label, guess in zip(panels.flat, images, labels, predicted, strict=False):
        axes.imshow(image)
        text = f"{guess}" if guess == label else f"{guess}, is {label}"
        axes.set_title(text, color="tab:green" if guess == label else "tab:red", y=-0.24, weight="bold")
    _write(figure, path)


def _draw_instance(axes: Axes, entry: Mapping, label: str) -> None:
    """Draws mask, box and label of a COCO annotation or result."""
    colour = _COLOURS[(entry["category_id"] - 1) % len(_COLOURS)]
    mask = coco_mask.decode(entry["segmentation"]).astype(bool)
    tint = np.zeros((*mask.shape, 4))
    tint[mask] = (*colour, 0.55)
    axes.imshow(tint, interpolation="nearest")
    axes.contour(mask, levels=[0.5], colors=[colour], linewidths=0.8)
    x, y, width, height = entry["bbox"]
    axes.add_patch(Rectangle((x - 0.5, y - 0.5), width, height, fill=False, edgecolor=colour, linewidth=1.6))
    below = y < 14  # no room above the box
    chip = dict(color="white", fontsize=8, weight="bold", bbox={"facecolor": colour, "edgecolor": "none", "pad": 1.0})
    axes.text(x, y + 1 if below else y - 1, label, va="top" if below else "bottom", in_layout=False, **chip)


def _count_matches(expected: Sequence[Mapping], predicted: Sequence[Mapping]) -> int:
    """Predictions with the right class and a mask IoU of at least 0.5 with a free annotation."""
    free = list(expected)
    for entry in sorted(predicted, key=lambda entry: -entry["score"]):
        same = [other for other in free if other["category_id"] == entry["category_id"]]
        if same:
            crowd = [False] * len(same)
            overlap = coco_mask.iou([entry["segmentation"]], [other["segmentation"] for other in same], crowd)[0]
            if overlap.max() >= 0.5:
                free.remove(same[int(overlap.argmax())])
    return len(expected) - len(free)


def _write(figure: Figure, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(path) as aside:
        figure.savefig(aside, format="png")
