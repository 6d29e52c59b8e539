#!/usr/bin/env python3
"""Small digits in large scenes: one pass of a pyramid against tiles of a plain detector, at equal executed FLOPs.

Trains tiny detectors on scenes, and one on tiles of them; tests all on the same scenes, prints a table and draws it.
Another call trains what is missing. All of it takes about an hour on one core of a CPU.

Example:
    python tools/small_objects.py --output output/small_objects
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable, Mapping
from contextlib import redirect_stdout
from dataclasses import dataclass
from functools import partial
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from tabulate import tabulate
from tqdm import tqdm

from piip.data import read_image
from piip.detector import Detector, Predictions
from piip_core import PIIPConfig
from piip_core.errors import UserError
from piip_core.files import atomic_path, lock_folder, publish_folder
from piip_digits.scenes import SPLITS, SceneConfig
from piip_tools import claim

SCENES = SceneConfig(image_size=256, min_digits=8, max_digits=14, min_digit_size=14, max_digit_size=56)
NUM_SCENES = {"num_train": 800, "num_val": 120}
TILE = 144  # two by two to a scene, with SAHI's overlap of a fifth
SEEDS = (0, 1)
_STEPS, _BATCH = 400, 4  # scenes of a step, or all their tiles
_LEAST_SCORE, _DRAWN_SCORE = 0.05, 0.5


@dataclass(frozen=True)
class Model:
    """A detector to train, on scenes or on tiles of them."""

    backbone: PIIPConfig
    tiles: bool = False

    @property
    def seen(self) -> int:
        """Side of what it sees at once, in pixels of the scene."""
        return TILE if self.tiles else SCENES.image_size


MODELS = {
    "pyramid": Model(claim.pyramid(36, 64, 96)),
    "plain": Model(claim.plain(80)),
    "plain_large": Model(claim.plain(96)),
    "tiles": Model(claim.plain(44), tiles=True),
}


def train_models(output: Path) -> None:
    """Trains what is not there yet, all models with one seed after the other."""
    with lock_folder(output):
        claim.prepare(output, SCENES, NUM_SCENES)
        cut_tiles(output)
        for seed in SEEDS:
            for name, model in MODELS.items():
                weights = output / f"{name}_{seed}" / "model_final.pth"
                if not weights.is_file():
                    tqdm.write(f"training {name}, seed {seed}")
                    claim.train(config(model, output), weights.parent, seed)


def config(model: Model, output: Path) -> Any:
    """LazyConfig that trains a model."""
    scale = claim.SCENES.image_size / claim.SCENES.max_digit_size * SCENES.max_digit_size / model.seen
    cfg = claim.detector_config(model.backbone, output, digit_scale=scale)
    cfg.dataloader.train.total_batch_size, cfg.train.max_iter = _BATCH, _STEPS
    if model.tiles:
        cfg.dataloader.train.total_batch_size *= 4
        for part, split in (("train", "train"), ("test", "val")):
            cfg.data[part].annotations = str(output / "tiles" / f"{split}_coco.json")
            cfg.data[part].images = str(output / "tiles" / split)
    return cfg


def cut_tiles(output: Path) -> None:
    """Cuts the scenes into tiles, as SAHI does for training."""
    from sahi.slicing import slice_coco

    if (output / "tiles").is_dir():
        return
    with publish_folder(output / "tiles") as aside, redirect_stdout(StringIO()):
        for split in SPLITS:
            images = str(output / "scenes" / split)
            slice_coco(
                str(output / f"{split}.json"), images, split, str(aside / split), slice_height=TILE, slice_width=TILE
            )
