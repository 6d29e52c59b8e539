"""What a report says of an evaluation: from the predictions that it wrote, for each kind of data."""

from __future__ import annotations

import io
import json
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from detectron2.evaluation.fast_eval_api import COCOeval_opt
from detectron2.utils.colormap import colormap
from omegaconf import DictConfig
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from tqdm import tqdm

from piip.charts import Section, draw_bars, draw_confusion, draw_images, draw_precision_recall, shorten_name
from piip.data import read_image
from piip.data.classification import PREDICTIONS, folder_categories
from piip.data.coco import GROUND_TRUTH
from piip.data.label_maps import label_classes, read_label_map
from piip_core.errors import UserError

KINDS = {
    "found": "#2ca02c",
    "missed": "#d62728",
    "wrong class": "#ff7f0e",
    "duplicate": "#9467bd",
    "background": "#1f77b4",
}
"""What may become of objects and detections, and the colours of their boxes."""

_IOU = 0.5  # from which on a detection may be that of an object
_WORST = 12  # images that are drawn
_LONG = 20  # rows that are shown at once


class Match(NamedTuple):
    """What became of an object or a detection: one of `KINDS`, the classes in truth and prediction, and where it is."""

    kind: str
    truth: int
    predicted: int
    box: Sequence[float]
    score: float


def detection_sections(cfg: DictConfig, inference: Path, pictures: Path) -> Iterator[Section]:
    """AP by class and size, precision over recall, confusions, the worst images; of masks where there are any."""
    found = json.loads((inference / "coco_instances_results.json").read_bytes())
    with redirect_stdout(io.StringIO()):
        truth = COCO(inference / GROUND_TRUTH)
    if not truth.anns:
        yield Section("Evaluation", f"The {len(truth.imgs)} validation images have no objects to compare with.")
        return
    kind = "segm" if found and "segmentation" in found[0] and cfg.dataloader.evaluator.require_masks else "bbox"
    evaluated = evaluate_coco(truth, found, kind)
    accumulated, classes = evaluated.eval, evaluated.params.catIds
    names = [truth.cats[category]["name"] for category in classes]
    threshold = best_threshold(evaluate_coco(truth, found, kind, iou=_IOU))
    matches = match_objects(truth, [entry for entry in found if entry["score"] >= threshold], kind)
    matrix = count_confusions((match for group in matches.values() for match in group), len(names))
    what = "masks" if kind == "segm" else "boxes"
    yield _class_section(pictures, evaluated, names, matrix, threshold, what)
    yield _precision_recall(pictures, accumulated["precision"], evaluated.params.recThrs, names, what)
    yield _sizes(evaluated, truth)
    note = (
        f"Detections with scores of at least {threshold:.2f}, at which F1 is best, are compared with objects "
        f"that they overlap by half (IoU {_IOU}), the most certain first. Truth in rows, predictions in columns: the "
        "last column counts objects that were missed, the last row detections where there was nothing, or something "
        "found already."
    )
    yield confusion_section(pictures, matrix, [*names, "background"], note)
    yield _worst_detections(pictures, matches, truth, names, Path(cfg.data.test.images), threshold)


def evaluate_coco(
    truth: COCO, found: Sequence[Mapping[str, Any]], kind: str, *, classes: bool = True, iou: float | None = None
) -> COCOeval:
    """COCO's comparison of detections with objects, by Detectron2's faster implementation.

    With `iou` that is the only one, sizes are of no account, nor, without `classes`, are these; then COCO's own
    implementation says what was matched with what (`evalImgs`).
    """
    if kind == "segm":  # sizes are then those of the masks
        found = [{key: value for key, value in entry.items() if key != "bbox"} for entry in found]
    with redirect_stdout(io.StringIO()):
        detections = COCO()
        if found:
            detections = truth.loadRes([dict(entry) for entry in found])
        else:
            detections.dataset = {**truth.dataset, "annotations": []}
            detections.createIndex()
        evaluated = (COCOeval_opt if iou is None else COCOeval)(truth, detections, kind)
        params = evaluated.params
        params.useCats = int(classes)
        if iou is not None:
            params.iouThrs, params.maxDets = np.array([iou]), [max(len(found), 1)]
            params.areaRng, params.areaRngLbl = params.areaRng[:1], params.areaRngLbl[:1]
        evaluated.evaluate()
        if iou is None:
            evaluated.accumulate()
    return evaluated


def best_threshold(evaluated: COCOeval) -> float:
    """The score, in steps of 0.05, from which on all detections together have the best F1, at an evaluation's IoU."""
    entries = [entry for entry in evaluated.evalImgs if entry]
    counted = [~np.asarray(entry["dtIgnore"][0], dtype=bool) for entry in entries]
    scores = np.concatenate([np.array(e["dtScores"])[valid] for e, valid in zip(entries, counted, strict=True)])
    hits = np.concatenate([e["dtMatches"][0][valid] > 0 for e, valid in zip(entries, counted, strict=True)])
    objects = sum(int(np.sum(np.asarray(entry["gtIgnore"]) == 0)) for entry in entries)
    steps = np.arange(1, 20) / 20
    f1 = [2 * np.sum(hits & (scores >= step)) / max(np.sum(scores >= step) + objects, 1) for step in steps]
    return float(steps[int(np.argmax(f1))])


def match_objects(truth: COCO, found: Sequence[Mapping[str, Any]], kind: str) -> dict[int, list[Match]]:
    """What became of all objects and detections, by image id.

    COCO's matching, whatever the classes: the most certain detection takes the object that it overlaps most.
    """
    evaluated = evaluate_coco(truth, found, kind, classes=False, iou=_IOU)
    index = {category: k for k, category in enumerate(evaluated.params.catIds)}
    nothing, objects, detections = len(index), truth.anns, evaluated.cocoDt.anns
    matches: dict[int, list[Match]] = defaultdict(list)
    for image in filter(None, evaluated.evalImgs):
        group = matches[image["image_id"]]
        overlaps = evaluated.ious[image["image_id"], -1]
        rows = zip(image["dtIds"], image["dtMatches"][0], image["dtIgnore"][0], strict=True)
        for row, (detection, matched, ignored) in enumerate(rows):
            entry = detections[detection]
            predicted, true = index[entry["category_id"]], nothing
            if ignored:  # a crowd
                continue
            if matched:
                true = index[objects[int(matched)]["category_id"]]
                what = "found" if true == predicted else "wrong class"
            else:
                what = "duplicate" if len(overlaps) and max(overlaps[row], default=0) >= _IOU else "background"
            group.append(Match(what, true, predicted, entry["bbox"], entry["score"]))
        for number, matched, ignored in zip(image["gtIds"], image["gtMatches"][0], image["gtIgnore"], strict=True):
            if not matched and not ignored:
                entry = objects[number]
                group.append(Match("missed", index[entry["category_id"]], nothing, entry["bbox"], 0.0))
    return matches


def count_confusions(matches: Iterable[Match], classes: int) -> np.ndarray:
    """Counts (classes + 1, classes + 1) of pairs of truth and prediction; the last of each is nothing."""
    matrix = np.zeros((classes + 1, classes + 1), dtype=np.int64)
    for match in matches:
        matrix[match.truth, match.predicted] += 1
    return matrix


def _class_section(
    pictures: Path, evaluated: COCOeval, names: Sequence[str], matrix: np.ndarray, threshold: float, what: str
) -> Section:
    precision, true = evaluated.eval["precision"], np.diag(matrix)
    rows = [("class", "objects", "AP", "AP50", "precision", "recall")]
    values = []
    for k, name in enumerate(names):
        objects, predicted = matrix[k].sum(), matrix[:, k].sum()
        values.append(_mean(precision[:, :, k, 0, -1]))
        shares = [true[k] / count * 100 if count else None for count in (predicted, objects)]
        numbers = [values[-1], _mean(precision[0, :, k, 0, -1]), *shares]
        rows.append((name, str(objects), *map(_number, numbers)))
    draw_bars(pictures / "classes.png", names, values, f"AP of {what}")
    text = f"AP of {what} by class. Precision and recall are those of detections with scores from {threshold:.2f} on."
    return Section("Classes", text, "classes.png", rows, len(rows) > _LONG)


def _precision_recall(
    pictures: Path, precision: np.ndarray, recall: np.ndarray, names: Sequence[str], what: str
) -> Section:
    shown = [k for k in range(len(names)) if precision[0, 0, k, 0, -1] > -1]
    precision = precision[:, :, shown, 0, -1]
    means = {"mean, IoU 0.5": precision[0], "mean, IoU 0.75": precision[5], "mean, IoU 0.5 to 0.95": precision.mean(0)}
    draw_precision_recall(
        pictures / "precision_recall.png",
        recall,
        {names[k]: precision[0, :, column] for column, k in enumerate(shown)},
        {name: values.mean(axis=1) for name, values in means.items()},
    )
    return Section("Precision and recall", f"Of {what}; thin lines are classes at IoU 0.5.", "precision_recall.png")


def _sizes(evaluated: COCOeval, truth: COCO) -> Section:
    params = evaluated.params
    areas = np.array([entry["area"] for entry in truth.anns.values() if not entry["iscrowd"]])
    labels = ("all", "small: below 32 × 32 pixels", "medium: below 96 × 96 pixels", "large")
    rows = [("size", "objects", "AP", "AR")]
    for k, (label, (low, high)) in enumerate(zip(labels, params.areaRng, strict=True)):
        numbers = [_mean(evaluated.eval["precision"][:, :, :, k, -1]), _mean(evaluated.eval["recall"][:, :, k, -1])]
        rows.append((label, str(np.sum((areas >= low) & (areas < high))), *map(_number, numbers)))
    return Section("Sizes of objects", "AP and average recall by the area of objects.", rows=rows)


def _worst_detections(
    pictures: Path,
    matches: Mapping[int, Sequence[Match]],
    truth: COCO,
    names: Sequence[str],
    images: Path,
    threshold: float,
) -> Section:
    def errors(image: int) -> int:
        return sum(match.kind != "found" for match in matches[image])

    counts = Counter(match.kind for group in matches.values() for match in group)
    rows = [tuple(KINDS), tuple(str(counts[kind]) for kind in KINDS)]
    worst = sorted((image for image in matches if errors(image)), key=errors, reverse=True)[:_WORST]
    title, text = "Worst images", f"Those with most errors, at scores from {threshold:.2f} on."
    if not worst:
        return Section(title, "No image has an error.", rows=rows)
    panels = []
    for image in worst:
        kinds = Counter(match.kind for match in matches[image] if match.kind != "found")
        name = truth.imgs[image]["file_name"]
        said = ", ".join(f"{count} {kind}" for kind, count in kinds.items())
        group = sorted(matches[image], key=lambda match: list(KINDS).index(match.kind), reverse=True)  # the last on top
        boxes = [(match.box, _caption(match, names), KINDS[match.kind]) for match in group]
        panels.append((f"{name}\n{said}", _read(images / name), boxes))
    draw_images(pictures / "worst.jpg", panels, 3, KINDS)
    return Section(title, text, "worst.jpg", rows)


def _caption(match: Match, names: Sequence[str]) -> str:
    if match.kind == "found":
        return ""
    if match.kind == "missed":
        return shorten_name(names[match.truth])
    instead = f", not {shorten_name(names[match.truth])}" if match.kind == "wrong class" else ""
    return f"{shorten_name(names[match.predicted])}{instead} {match.score:.0%}"


def label_map_sections(cfg: DictConfig, inference: Path, pictures: Path) -> Iterator[Section]:
    """IoU by class, confusions of pixels, the images with the lowest share of correct pixels."""
    known = label_classes(cfg.data.classes, cfg.data.get("reduce_zero_label"))
    names, indices = known.names, {category.id: k for k, category in enumerate(known.categories)}
    by_image: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for entry in json.loads((inference / "sem_seg_predictions.json").read_bytes()):
        by_image[entry["file_name"]].append(entry)

    def read(name: str) -> tuple[np.ndarray, np.ndarray]:
        truth = read_label_map(by_image[name][0]["sem_seg_file_name"], known)
        predicted = np.zeros_like(truth)
        for entry in by_image[name]:
            predicted[coco_mask.decode(entry["segmentation"]) > 0] = indices[entry["category_id"]]
        return truth, predicted

    matrix, correct = np.zeros((len(names), len(names)), dtype=np.int64), {}
    for name in tqdm(by_image, "report: label maps", unit="image", delay=2, disable=None):
        truth, predicted = (values.astype(np.int64) for values in read(name))
        valid = truth < len(names)
        counts = np.bincount(truth[valid] * len(names) + predicted[valid], minlength=matrix.size).reshape(matrix.shape)
        matrix += counts
        correct[name] = np.trace(counts) / max(counts.sum(), 1)
    true, objects = np.diag(matrix), matrix.sum(axis=1)
    union = matrix.sum(axis=0) + objects - true
    iou = [true[k] / union[k] if objects[k] else None for k in range(len(names))]
    yield _value_section(pictures, names, iou, "IoU")
    text = "Pixels, truth in rows and predictions in columns, coloured by the share of the row."
    yield confusion_section(pictures, matrix, names, text)
    palette, panels = colormap(rgb=True).astype(np.uint8), []
    for name in sorted(correct, key=correct.__getitem__)[: _WORST // 2]:
        image, (truth, predicted) = _read(Path(name)), read(name)
        panels.append((f"{Path(name).name}\n{correct[name]:.1%} correct", image, ()))
        panels.append(("truth", blend(image, truth, palette), ()))
        panels.append(("predicted", blend(image, predicted, palette), ()))
    draw_images(pictures / "worst.jpg", panels, 3)
    yield Section("Worst images", "Those with the lowest share of correct pixels.", "worst.jpg")


def classification_sections(cfg: DictConfig, inference: Path, pictures: Path) -> Iterator[Section]:
    """Accuracy by class, confusions, the most certain mistakes."""
    entries = json.loads((inference / PREDICTIONS).read_bytes())
    names = [category.name for category in folder_categories(cfg.data.test.images or cfg.data.train.images)]
    matrix = np.zeros((len(names), len(names)), dtype=np.int64)
    for entry in entries:
        matrix[entry["label"], entry["predicted"]] += 1
    counts = matrix.sum(axis=1)
    accuracy = [true / count if count else None for true, count in zip(np.diag(matrix), counts, strict=True)]
    yield _value_section(pictures, names, accuracy, "accuracy")
    yield confusion_section(pictures, matrix, names, "Images, truth in rows and predictions in columns.")
    wrong = sorted((e for e in entries if e["label"] != e["predicted"]), key=lambda e: -e["score"])
    if not wrong:
        yield Section("Worst images", "All images are classified correctly.")
        return
    panels = []
    for entry in wrong[:_WORST]:
        title = f"{names[entry['label']]}\nseen as {names[entry['predicted']]} ({entry['score']:.0%})"
        panels.append((title, _read(entry["file_name"]), ()))
    draw_images(pictures / "worst.jpg", panels, 4)
    yield Section("Worst images", f"The most certain of {len(wrong)} mistakes in {len(entries)} images.", "worst.jpg")


SECTIONS = {"coco": detection_sections, "label_maps": label_map_sections, "class_folders": classification_sections}
"""By `data.kind`."""


def confusion_section(pictures: Path, matrix: np.ndarray, names: Sequence[str], text: str) -> Section:
    """The matrix, and as a table what is confused most."""
    left_out = draw_confusion(pictures / "confusion.png", matrix, names)
    wrong = matrix - np.diag(np.diag(matrix))
    pairs = [divmod(int(place), len(names)) for place in np.argsort(-wrong, axis=None, kind="stable")[:_LONG]]
    rows = [(names[a], names[b], str(wrong[a, b])) for a, b in pairs if wrong[a, b]]
    return Section("Confusions", f"{text} {left_out}", "confusion.png", [("truth", "predicted", "count"), *rows], True)


def blend(image: np.ndarray, labels: np.ndarray, palette: np.ndarray) -> np.ndarray:
    """An image (H, W, 3) uint8 under the colours of its labels (H, W); the palette's number of colours is repeated.

    Labels of 255 are left as they are.
    """
    mixed = (image * 0.45 + palette[labels % len(palette)] * 0.55).astype(np.uint8)
    return np.where((labels == 255)[..., None], image, mixed)


def _value_section(pictures: Path, names: Sequence[str], shares: Sequence[float | None], what: str) -> Section:
    values = [None if share is None else float(share) * 100 for share in shares]
    draw_bars(pictures / "classes.png", names, values, f"{what} in %")
    rows = [("class", what), *((name, _number(value)) for name, value in zip(names, values, strict=True))]
    return Section("Classes", f"{what} by class.", "classes.png", rows, True)


def _mean(values: np.ndarray) -> float | None:
    """In percent; COCO says -1 where there are no objects."""
    valid = values[values > -1]
    return float(valid.mean()) * 100 if valid.size else None


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.1f}"


def _read(path: Path | str) -> np.ndarray:
    try:
        return read_image(str(path))
    except UserError:  # moved since it was evaluated
        return np.full((240, 320, 3), 200, dtype=np.uint8)
