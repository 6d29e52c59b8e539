#!/usr/bin/env python3
"""Small digits in large scenes: one pass of a pyramid against tiles of a plain detector, at equal executed FLOPs.

Trains tiny detectors on scenes, and one on tiles of them; tests all on the same scenes, prints a table and draws it.
Another call trains what is missing. All of it takes half an hour on one core of a CPU that has nothing else to do.

Example:
    python tools/small_objects.py --output output/small_objects
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping
from contextlib import redirect_stdout
from dataclasses import dataclass
from functools import partial
from io import StringIO
from pathlib import Path
from statistics import mean, median
from typing import Any, NamedTuple

import numpy as np
from detectron2.structures import Instances
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from tabulate import tabulate
from tqdm import tqdm

from piip.data import read_image
from piip.detector import Detector
from piip.predict import Predictor
from piip.tiles import detect_in_tiles
from piip_core import PIIPConfig
from piip_core.errors import UserError
from piip_core.files import lock_folder, publish_folder, write_atomically
from piip_digits.scenes import SPLITS, SceneConfig
from piip_tools import claim
from piip_tools.flops.executed import executed_macs
from piip_tools.timing import clock_for, limited_threads, peak_memory, time_in_turns

SCENES = SceneConfig(image_size=256, min_digits=6, max_digits=10, min_digit_size=20, max_digit_size=72)
NUM_SCENES = {"num_train": 1000, "num_val": 120}
TILE = 144  # two by two to a scene, with sahi's overlap of a fifth
TOLERANCE = 0.04
"""How far the FLOPs of the first three ways may be from their median."""

_STEPS, _BATCH = 400, 8  # scenes of a step, or all their tiles
_LEAST_SCORE, _DRAWN_SCORE = 0.05, 0.5
_TIMED_SCENES, _REPEATS = 6, 5


@dataclass(frozen=True)
class Way:
    """A trained model, and how it looks at a scene."""

    title: str
    model: str
    backbone: PIIPConfig
    tiles: bool = False
    whole: bool = False  # besides the tiles
    image_size: int | None = None  # other than in training


WAYS = (
    Way("pyramid, one pass", "pyramid", claim.pyramid(28, 52, 76)),
    Way("plain, one pass", "plain", claim.plain(64)),
    Way("plain, four tiles", "tiles", claim.plain(36), tiles=True),
    Way("plain, four tiles and the whole", "tiles", claim.plain(36), tiles=True, whole=True),
    Way("pyramid, one pass, enlarged", "pyramid", claim.pyramid(28, 52, 76), image_size=92),
    Way("plain, one pass, enlarged", "plain", claim.plain(64), image_size=76),
)
"""The first three cost the same, and the last two; these are trained at their smaller sizes."""


class Measured(NamedTuple):
    """What a way costs for a scene, and its scores by seed."""

    gmacs: float
    milliseconds: float
    megabytes: float
    scores: list[dict[str, float]]


def train_models(output: Path, seeds: int) -> None:
    """Trains what is not there yet, all models with one seed after the other."""
    with lock_folder(output):
        claim.prepare(output, SCENES, NUM_SCENES)
        _cut_tiles(output)
        for seed in range(seeds):
            for way in WAYS[:3]:
                folder = output / f"{way.model}_{seed}"
                if not (folder / "model_final.pth").is_file():
                    tqdm.write(f"training {way.model}, seed {seed}")
                    claim.train(model_config(way, output), folder, seed)


def model_config(way: Way, output: Path) -> Any:
    """LazyConfig that trains the model of a way."""
    seen = TILE if way.tiles else SCENES.image_size
    scale = (SCENES.max_digit_size / seen) / (claim.SCENES.max_digit_size / claim.SCENES.image_size)
    cfg = claim.detector_config(way.backbone, output, digit_scale=scale)
    cfg.dataloader.train.total_batch_size, cfg.train.max_iter = _BATCH, _STEPS
    rpn = cfg.model.proposal_generator
    cfg.model.roi_heads.batch_size_per_image, rpn.batch_size_per_image = 64, 128  # of more digits than in the claim
    if way.tiles:
        cfg.dataloader.train.total_batch_size = 4 * _BATCH
        rpn.post_nms_topk = [rpn.post_nms_topk[0], rpn.post_nms_topk[1] // 4]  # as many for a scene
        for part, split in (("train", "train"), ("test", "val")):
            folder = output / "tiles" / split
            cfg.data[part].annotations, cfg.data[part].images = str(folder / f"{split}_coco.json"), str(folder)
    return cfg


def _cut_tiles(output: Path) -> None:
    """Cuts the scenes into tiles to train on, as sahi does."""
    from sahi.slicing import slice_coco

    if (output / "tiles").is_dir():
        return
    with publish_folder(output / "tiles", durable=False) as aside, redirect_stdout(StringIO()):
        for split in SPLITS:
            scenes = (str(output / f"{split}.json"), str(output / "scenes" / split))
            slice_coco(*scenes, split, str(aside / split), slice_height=TILE, slice_width=TILE)


def _read_truth(output: Path) -> COCO:
    with redirect_stdout(StringIO()):
        return COCO(str(output / "val.json"))


def detect(way: Way, predictor: Predictor, image: np.ndarray) -> Instances:
    """What a way finds in a scene."""
    if way.tiles:
        return detect_in_tiles(predictor, image, TILE, min_score=_LEAST_SCORE, whole=way.whole)
    return predictor(image, min_score=_LEAST_SCORE)


def score(predictor: Predictor, found: Mapping[int, Instances], truth: COCO) -> dict[str, float]:
    """Box AP by COCO's rules of what was found in images, by their ids."""
    with redirect_stdout(StringIO()):
        results = truth.loadRes([entry for key, objects in found.items() for entry in predictor.to_coco(objects, key)])
        evaluation = COCOeval(truth, results, "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return dict(zip(("AP", "AP50", "AP75", "APs", "APm"), 100 * evaluation.stats[:5], strict=True))


def measure(output: Path, seeds: int) -> tuple[dict[Way, Measured], dict[Way, Instances]]:
    """Tests all ways on the validation scenes, one thread; also returns what three find in the first, with seed 0."""
    truth = _read_truth(output)
    paths = {key: output / "scenes/val" / image["file_name"] for key, image in truth.imgs.items()}
    scenes = {key: read_image(str(path)) for key, path in paths.items()}
    scores: dict[Way, list[dict[str, float]]] = {way: [] for way in WAYS}
    calls, models = {}, {}
    for seed in reversed(range(seeds)):  # the first one's models stay
        for way in tqdm(WAYS, desc=f"seed {seed}", unit="way"):
            folder = output / f"{way.model}_{seed}"
            predictor = Detector(folder, device="cpu", image_size=way.image_size).predictor
            models[way], calls[way] = predictor.model, partial(detect, way, predictor)
            path = folder / f"{way.title}.json"
            if not path.is_file():
                found = {key: calls[way](image) for key, image in scenes.items()}
                with write_atomically(path, "w") as file:
                    json.dump(score(predictor, found, truth), file)
            scores[way].insert(0, json.loads(path.read_text()))
    some = list(scenes.values())[:_TIMED_SCENES]
    first = {way: calls[way](some[0]) for way in WAYS[:3]}
    works = {way: lambda call=call: [call(image) for image in some] for way, call in calls.items()}
    seconds = time_in_turns(works, _REPEATS, clock_for("cpu", 1))
    measured = {}
    for way in WAYS:
        gmacs = mean(executed_macs(partial(calls[way], image)) for image in some) / 1e9
        memory = max(peak_memory(partial(calls[way], image), models[way], "cpu") for image in some) / 1e6
        measured[way] = Measured(gmacs, 1e3 * median(seconds[way]) / len(some), memory, scores[way])
    return measured, first


def table(measured: Mapping[Way, Measured]) -> str:
    """Markdown table: a line per way, mean and standard deviation over the seeds."""
    lines = []
    for way, result in measured.items():
        sizes = way.image_size or "/".join(str(branch.image_size) for branch in reversed(way.backbone.branches))
        cells = [claim.spread([scores[key] for scores in result.scores]) for key in ("APs", "APm", "AP", "AP50")]
        costs = (f"{result.gmacs:.2f}", f"{result.milliseconds:.0f}", f"{result.megabytes:.1f}")
        lines.append((way.title, sizes, *costs, *cells))
    headers = ("", "image", "GMACs", "ms", "MB", "AP small", "AP medium", "AP", "AP50")
    return tabulate(lines, headers, tablefmt="github", disable_numparse=True, colalign=["left"] * 2 + ["right"] * 7)


def draw_scene(output: Path, found: Mapping[Way, Instances]) -> Figure:
    """The first validation scene with its digits, and with what ways find in it."""
    truth = _read_truth(output)
    key, record = next(iter(truth.imgs.items()))
    image = read_image(str(output / "scenes/val" / record["file_name"]))
    panels = {"digits": [entry["bbox"] for entry in truth.imgToAnns[key]]}
    for way, objects in found.items():
        boxes = objects[objects.scores >= _DRAWN_SCORE].pred_boxes.tensor.numpy()
        panels[way.title] = np.concatenate((boxes[:, :2], boxes[:, 2:] - boxes[:, :2]), axis=1)
    figure = Figure(figsize=(8, 8.4), layout="constrained", dpi=54)
    for axes, (title, boxes) in zip(figure.subplots(2, 2).flat, panels.items(), strict=True):
        axes.imshow(image)
        axes.set_title(f"{title}: {len(boxes)}", fontsize=11)
        axes.set_axis_off()
        for x, y, width, height in boxes:
            axes.add_patch(Rectangle((x, y), width, height, fill=False, edgecolor="yellow"))
    return figure


def draw_costs(measured: Mapping[Way, Measured]) -> Figure:
    """AP of small digits against time, one point per seed."""
    figure = Figure(figsize=(7, 4.5), layout="constrained", dpi=100)
    axes = figure.subplots()
    for way, result in measured.items():
        values = [scores["APs"] for scores in result.scores]
        axes.plot([result.milliseconds] * len(values), values, "o-", label=f"{way.title} ({result.gmacs:.2f} GMACs)")
    axes.set(
        xlabel="milliseconds of one CPU core per scene", ylabel="AP of small digits", xlim=(0, None), ylim=(0, None)
    )
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("output/small_objects"), metavar="FOLDER")
    parser.add_argument("--seeds", type=int, default=2, metavar="N", help="trainings of each model (default 2)")
    args = parser.parse_args()
    output = args.output
    try:
        train_models(output, args.seeds)
        with limited_threads(1):
            measured, found = measure(output, args.seeds)
    except UserError as error:
        sys.exit(f"small_objects: {error}")
    print(table(measured))
    for name, figure in (("scene", draw_scene(output, found)), ("costs", draw_costs(measured))):
        with write_atomically(output / f"{name}.png") as file:
            figure.savefig(file, format="png")


if __name__ == "__main__":
    main()
