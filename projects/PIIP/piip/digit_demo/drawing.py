"""Pictures of a demo run: predictions beside the ground truth, curves, a confusion matrix.

Everything is drawn from files that the training wrote (COCO annotations, COCO results, the JSON lines of Detectron2's
writer), so nothing here needs a model or Detectron2.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from PIL import Image
from pycocotools import mask as coco_mask

from piip_core.files import atomic_path

__all__ = ["Curve", "draw_classified", "draw_confusion", "draw_curves", "draw_predictions", "read_metrics"]

_COLOURS = colormaps["tab10"].colors  # one per digit, the same in ground truth and prediction
_SCORE = 0.5  # predictions below it are not drawn


@dataclass(frozen=True)
class Curve:
    """A line of a plot: its name and its points."""

    name: str
    steps: Sequence[float]
    values: Sequence[float]


def read_metrics(path: Path | str) -> dict[str, Curve]:
    """Reads the JSON lines that Detectron2's JSONWriter appends to.

    A resumed run repeats iterations: the last value of each counts.

    Returns:
        One curve per metric.
    """
    points: dict[str, dict[int, float]] = {}
    for line in Path(path).read_text().splitlines():
        entry = json.loads(line)
        for name, value in entry.items():
            if name != "iteration":
                points.setdefault(name, {})[int(entry["iteration"])] = value
    return {name: Curve(name, sorted(at), [at[step] for step in sorted(at)]) for name, at in points.items()}


def draw_curves(
    path: Path | str,
    title: str,
    loss: Sequence[Curve],
    score: Sequence[Curve],
    score_label: str,
    step_label: str = "iteration",
) -> None:
    """Draws losses (left) and scores in percent (right) over the steps and writes the picture to `path`."""
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    figure.suptitle(title)
    left, right = figure.subplots(1, 2)
    for index, curve in enumerate(loss):
        left.plot(curve.steps, curve.values, label=curve.name, linewidth=2.0 if index == 0 else 1.0)
    left.set(xlabel=step_label, ylabel="loss", ylim=(0, None))
    for index, curve in enumerate(score):
        right.plot(curve.steps, curve.values, "o-", label=curve.name, color=f"C{index}")
        right.annotate(
            f"{curve.values[-1]:.1f}",
            (curve.steps[-1], curve.values[-1]),
            textcoords="offset points",
            xytext=(6, 0),
            va="center",
            color=f"C{index}",
            weight="bold",
        )
    right.set(xlabel=step_label, ylabel=score_label, ylim=(0, 100))
    right.margins(x=0.12)
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.legend()
    _write(figure, path)


def draw_predictions(
    path: Path | str, title: str, annotations: Path | str, images: Path | str, results: Path | str, count: int = 12
) -> None:
    """Draws validation images in pairs, ground truth left and prediction right, and writes the picture to `path`.

    The images are spread evenly over the annotation file; none is chosen for how it came out.

    Args:
        path: picture to write.
        title: text above it.
        annotations: COCO annotation file.
        images: folder of the images.
        results: predictions in COCO's result format (`coco_instances_results.json` of Detectron2's evaluator).
        count: number of pairs.
    """
    truth = json.loads(Path(annotations).read_text())
    names = {category["id"]: category["name"] for category in truth["categories"]}
    by_image: dict[str, dict[int, list[dict]]] = {"truth": {}, "prediction": {}}
    for kind, entries in (("truth", truth["annotations"]), ("prediction", json.loads(Path(results).read_text()))):
        for entry in entries:
            if entry.get("score", 1.0) >= _SCORE:
                by_image[kind].setdefault(entry["image_id"], []).append(entry)
    shown = [truth["images"][i * len(truth["images"]) // count] for i in range(min(count, len(truth["images"])))]
    pairs_per_row = min(3, len(shown))
    rows = -(-len(shown) // pairs_per_row)
    figure = Figure(figsize=(pairs_per_row * 5.2, rows * 2.85 + 0.6), layout="constrained", dpi=110)
    figure.suptitle(title, fontsize=15)
    panels = figure.subplots(rows, pairs_per_row, squeeze=False, subplot_kw={"frame_on": False})
    for axes in panels.flat:
        axes.set_axis_off()
    for axes, image in zip(panels.flat, shown, strict=False):
        with Image.open(Path(images) / image["file_name"]) as picture:
            pixels = np.asarray(picture.convert("RGB"))
        gap = np.full((pixels.shape[0], 8, 3), 255, dtype=np.uint8)
        axes.imshow(np.concatenate([pixels, gap, pixels], axis=1), interpolation="bilinear")
        expected, predicted = (by_image[kind].get(image["id"], []) for kind in ("truth", "prediction"))
        found, extra = _count_matches(expected, predicted)
        for entry in expected:
            _draw_instance(axes, entry, names[entry["category_id"]], 0)
        for entry in predicted:
            label = f"{names[entry['category_id']]}  {entry['score']:.0%}"
            _draw_instance(axes, entry, label, pixels.shape[1] + gap.shape[1])
        height, width = pixels.shape[:2]
        axes.set(xlim=(-0.5, 2 * width + gap.shape[1] - 0.5), ylim=(height - 0.5, -0.5))
        caption = {"y": -5, "ha": "center", "va": "bottom", "fontsize": 10, "in_layout": False}
        axes.text(width / 2, s=f"ground truth: {len(expected)} digits", **caption)
        missed = len(expected) - found
        verdict = f"predicted: {found} right" + "".join(
            f", {number} {word}" for number, word in ((missed, "missed"), (extra, "wrong")) if number
        )
        axes.text(width * 1.5 + gap.shape[1], s=verdict, **caption)
    _write(figure, path)


def draw_confusion(path: Path | str, title: str, confusion: np.ndarray, names: Sequence[str]) -> None:
    """Draws a confusion matrix (true class down, predicted class across) and writes the picture to `path`."""
    figure = Figure(figsize=(6.2, 5.8), layout="constrained")
    axes = figure.subplots()
    share = confusion / np.maximum(confusion.sum(axis=1, keepdims=True), 1)
    axes.imshow(share, cmap="Blues", vmin=0, vmax=1)
    for (row, column), number in np.ndenumerate(confusion):
        if number:
            ink = "white" if share[row, column] > 0.5 else "black"
            axes.text(column, row, str(number), ha="center", va="center", color=ink, fontsize=9)
    axes.set(xlabel="predicted", ylabel="true", title=title)
    axes.set_xticks(range(len(names)), names)
    axes.set_yticks(range(len(names)), names)
    _write(figure, path)


def draw_classified(
    path: Path | str, title: str, images: np.ndarray, labels: Sequence[int], predicted: Sequence[int]
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


def _draw_instance(axes: Axes, entry: Mapping, label: str, offset: int) -> None:
    """Draws mask, box and label of a COCO annotation or result, moved right by `offset`."""
    colour = _COLOURS[(entry["category_id"] - 1) % len(_COLOURS)]
    mask = coco_mask.decode(entry["segmentation"]).astype(bool)
    tint = np.zeros((*mask.shape, 4))
    tint[mask] = (*colour, 0.55)
    height, width = mask.shape
    extent = (offset - 0.5, offset + width - 0.5, height - 0.5, -0.5)
    axes.imshow(tint, extent=extent, interpolation="nearest")
    axes.contour(np.arange(width) + offset, np.arange(height), mask, levels=[0.5], colors=[colour], linewidths=0.8)
    x, y, box_width, box_height = entry["bbox"]
    x += offset
    axes.add_patch(Rectangle((x - 0.5, y - 0.5), box_width, box_height, fill=False, edgecolor=colour, linewidth=1.6))
    chip = {"facecolor": colour, "edgecolor": "none", "pad": 1.0}
    below_edge = y < 14  # no room above the box
    axes.text(
        x,
        y + 1 if below_edge else y - 1,
        label,
        color="white",
        fontsize=8,
        weight="bold",
        va="top" if below_edge else "bottom",
        bbox=chip,
        in_layout=False,
    )


def _count_matches(expected: Sequence[Mapping], predicted: Sequence[Mapping]) -> tuple[int, int]:
    """Predictions with the right class and a mask IoU of at least 0.5 with a free annotation, and all others."""
    free, found = list(expected), 0
    for entry in sorted(predicted, key=lambda entry: -entry["score"]):
        same = [other for other in free if other["category_id"] == entry["category_id"]]
        if same:
            crowd = [False] * len(same)
            overlap = coco_mask.iou([entry["segmentation"]], [other["segmentation"] for other in same], crowd)[0]
            if overlap.max() >= 0.5:
                free.remove(same[int(overlap.argmax())])
                found += 1
    return found, len(predicted) - found


def _write(figure: Figure, path: Path | str) -> None:
    """Writes a figure as PNG."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(path) as aside:
        FigureCanvasAgg(figure).print_png(str(aside))
