"""The paper's claim on tiny networks: its comparisons at equal executed FLOPs, on scenes with small digits.

Networks are first trained on single digits, as those of the paper are on ImageNet; then every setting is trained as a
Faster R-CNN with the same data, length and schedule.
"""

from __future__ import annotations

import json
import platform
import runpy
import shutil
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, redirect_stderr, redirect_stdout
from dataclasses import asdict, replace
from functools import cache
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from detectron2.config import LazyConfig
from safetensors.torch import save_file
from tabulate import tabulate
from tqdm import tqdm

from piip.lazy import lazy_dataclass
from piip.setting_types import leave_unchecked
from piip_core.branches import ViTConfig
from piip_core.config import BranchConfig, ClassifierConfig, InteractionConfig, MergingConfig, PIIPConfig
from piip_core.errors import OutputFolderError, UserError
from piip_core.files import atomic_path, lock_folder, write_atomically
from piip_core.pyramid import DensePIIP
from piip_core.zoo.ablations import ABLATIONS
from piip_digits.data_sets import prepare_digit_images, prepare_digits
from piip_digits.scenes import SPLITS, SceneConfig

from .flops.executed import executed_count
from .flops.tables import paper_number

SEEDS = (0, 1, 2)
NETWORKS = {"B": (96, 4), "S": (56, 2), "T": (32, 1)}
"""Width and heads of each network."""
TOLERANCE = 0.035
"""How far the executed FLOPs of a setting may be from their median."""

SCENES = SceneConfig(image_size=256, min_digits=2, max_digits=5, min_digit_size=28, max_digit_size=90)
NUM_SCENES = {"num_train": 1200, "num_val": 250}
_DIGIT_SIZE = 16  # in pretraining
_PRETRAINING_STEPS, _STEPS, _BATCH = 500, 300, 8
_PATCH = 4
_GROUPS = 8  # of group norms
_CHANNELS = 32  # of the feature pyramid
_STRIDES = (2, 4)
_ALONE = InteractionConfig(num_interactions=0)
SCORES = ("AP", "APs")
"""Box AP by COCO's rules; APs is that of boxes below 32 x 32 of the 256 x 256 pixels of a scene."""

_ROOT = Path(__file__).resolve().parents[2]
_CONFIGS = _ROOT / "projects/PIIP/configs/demo"
_TRAIN = _ROOT / "tools/lazyconfig_train_net.py"


def _branch(network: str, image_size: int) -> BranchConfig:
    width, heads = NETWORKS[network]
    sizes = {"embed_dim": width, "num_heads": heads, "patch_size": _PATCH, "pos_grid": _DIGIT_SIZE // _PATCH}
    return BranchConfig(network=ViTConfig(depth=8, layer_scale=None, **sizes), image_size=image_size)


def pyramid(b: int, s: int, t: int, **interaction: Any) -> PIIPConfig:
    """The three networks, each at its image size, with an interaction after every second block."""
    return PIIPConfig(
        branches=(_branch("B", b), _branch("S", s), _branch("T", t)),
        # The publication's drop path is meant for weeks of training, not for minutes
        interaction=InteractionConfig(**{"num_interactions": 4, "num_heads": 2, "drop_path_rate": 0.0, **interaction}),
        merging=MergingConfig(out_strides=_STRIDES, num_groups=_GROUPS),
    )


def plain(image_size: int) -> PIIPConfig:
    return PIIPConfig(
        branches=(_branch("B", image_size),),
        interaction=_ALONE,
        merging=MergingConfig(kind="single", out_strides=_STRIDES, pyramid_norm="layer", num_groups=_GROUPS),
    )


SETTINGS = {
    "inverted": pyramid(20, 36, 52),
    "direct": pyramid(36, 28, 16),
    "one_scale": pyramid(32, 32, 32),
    "plain": plain(44),
    "regular": pyramid(20, 32, 48, attention="regular"),
    "interactions_0": pyramid(20, 36, 56, num_interactions=0),
    "interactions_12": pyramid(20, 32, 48, num_interactions=12),
    "alternating": pyramid(20, 36, 52, units="alternating"),
    "cycle_down": pyramid(20, 36, 52, units="cycle_down"),
    "cycle_up": pyramid(20, 36, 52, units="cycle_up"),
    "bidirectional_cycle": pyramid(20, 36, 48, units="bidirectional_cycle"),
}
"""Backbones by name, in the order in which they are trained; sizes are those at which all cost about the same."""

COMPARISONS = {
    "Design": (
        ("inverted", "parameter-inverted pyramid", "design_tsb_1568_1120_672"),
        ("one_scale", "the same networks at one scale", "design_tsb_896_896_896"),
        ("plain", "the large network alone", "design_b_1024"),
        ("direct", "parameter-direct pyramid", "design_tsb_448_672_896"),
    ),
    "Attention": (
        ("inverted", "4 x deformable", "interactions_4_deformable"),
        ("regular", "4 x regular", "interactions_4_regular"),
    ),
    "Number of interactions": (
        ("interactions_12", "12", "interactions_12_deformable"),
        ("inverted", "4", "interactions_4_deformable"),
        ("interactions_0", "0", "interactions_0"),
    ),
    "Directions": tuple(
        (setting, ABLATIONS[name].title, name)
        for setting, name in (
            ("bidirectional_cycle", "direction_bidirectional_cycle"),
            ("inverted", "direction_adjacent"),
            ("cycle_up", "direction_cycle_up"),
            ("alternating", "direction_alternating"),
            ("cycle_down", "direction_cycle_down"),
        )
    ),
}
"""What is compared: setting, its title, and the paper's setting of the same comparison (the best one first)."""


def finished_runs(output: Path) -> dict[tuple[str, int], dict[str, Any]]:
    """Results below a folder, by setting and seed; those of another training than today's do not count."""
    results = {}
    for name, seed in _runs():
        path = _result(output, name, seed)
        if path.is_file() and (result := json.loads(path.read_text()))["recipe"] == _recipe(name):
            results[name, seed] = result
    return results


def run_claim(output: Path) -> None:
    """Trains and evaluates what is not finished, all settings with one seed after the other.

    Several processes may share the work: what one is training, the others leave to it.

    Raises:
        UserError: If a run fails; the message names its log.
    """
    missing = [run for run in _runs() if run not in finished_runs(output)]
    if missing:
        prepare(output, SCENES, NUM_SCENES)
    done = len(SETTINGS) * len(SEEDS) - len(missing)
    for name, seed in tqdm(missing, desc="Runs", unit="run", initial=done, total=done + len(missing)):
        folder = output / "runs" / f"{name}_{seed}"
        with ExitStack() as stack:
            try:
                stack.enter_context(lock_folder(folder, otherwise="leave it to it"))
            except OutputFolderError:
                continue
            if (name, seed) not in finished_runs(output):
                tqdm.write(f"{name}, seed {seed}")
                _run(output, name, seed, folder)


def _run(output: Path, name: str, seed: int, folder: Path) -> None:
    start = time.monotonic()
    scores = train(detector_config(SETTINGS[name], output), folder / "training", seed)
    result = {
        "setting": name,
        "seed": seed,
        "scores": {score: scores[f"bbox/{score}"] for score in ("AP", "AP50", "APs", "APm")},
        "seconds": round(time.monotonic() - start),
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "recipe": _recipe(name),
    }
    path = _result(output, name, seed)
    path.parent.mkdir(parents=True, exist_ok=True)
    with write_atomically(path, "w") as file:
        json.dump(result, file, indent=1)


def _recipe(name: str) -> dict[str, Any]:
    """What decides a result, beside the seed."""
    lengths = {"pretraining_steps": _PRETRAINING_STEPS, "steps": _STEPS, "batch": _BATCH}
    recipe = {"backbone": SETTINGS[name].to_dict(), "scenes": asdict(SCENES) | NUM_SCENES, **lengths}
    return json.loads(json.dumps(recipe))  # as it is read


def claim_table(results: dict[tuple[str, int], dict[str, Any]]) -> str:
    """Markdown table: a line per setting and comparison, mean and standard deviation over the seeds."""
    lines = []
    for comparison, compared in COMPARISONS.items():
        for name, title, printed in compared:
            scores = [results[name, seed]["scores"] for seed in SEEDS if (name, seed) in results]
            sizes = "/".join(str(branch.image_size) for branch in reversed(SETTINGS[name].branches))
            paper = f"{paper_number(ABLATIONS[printed], 'box_ap'):.1f}"
            cells = [spread([score[key] for score in scores]) for key in SCORES]
            lines.append((comparison, title, sizes, f"{executed_flops(name) / 1e9:.3f}", len(scores), *cells, paper))
            comparison = ""  # once per comparison
    headers = ("comparison", "setting", "images", "GFLOPs", "seeds", *SCORES, "paper's box AP")
    align = ("left",) * 3 + ("right",) * (len(headers) - 3)
    return tabulate(lines, headers, tablefmt="github", colalign=align, disable_numparse=True)


def spread(values: Sequence[float]) -> str:
    if not values:
        return "-"
    deviation = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.1f}{deviation}"


@cache
def executed_flops(name: str) -> int:
    """Multiply-accumulates of a setting's backbone for an image, merging included."""
    backbone, side = DensePIIP(SETTINGS[name]), SETTINGS[name].image_size
    return executed_count(backbone, torch.zeros(1, 3, side, side)).total.macs


def _runs() -> Iterator[tuple[str, int]]:
    return ((name, seed) for seed in SEEDS for name in SETTINGS)  # seed after seed


def _result(output: Path, name: str, seed: int) -> Path:
    return output / "results" / f"{name}_{seed}.json"


def prepare(output: Path, scenes: SceneConfig, counts: dict[str, int]) -> None:
    """Scenes with a single class, single digits, and the networks trained on those."""
    with lock_folder(output):
        prepare_digit_images(output / "digits", image_size=_DIGIT_SIZE)
        prepare_digits(output / "scenes", **counts, config=scenes)
        for split in SPLITS:
            content = json.loads((output / f"scenes/annotations/instances_{split}.json").read_text())
            content["categories"] = [{"id": 1, "name": "digit"}]
            for digit in content["annotations"]:
                # With the area of a mask, COCO would count most wrong boxes as too large for a small object
                digit |= {"category_id": 1, "area": digit["bbox"][2] * digit["bbox"][3]}
                del digit["segmentation"]
            with write_atomically(output / f"{split}.json", "w") as file:
                json.dump(content, file)
        for network in NETWORKS:
            _pretrain(network, output)


def _pretrain(network: str, output: Path) -> None:
    """Trains a network as a classifier of single digits, unless an earlier call did."""
    path = output / "pretrained" / f"{network}.safetensors"
    if path.is_file():
        return
    folder = output / "runs" / f"pretraining_{network}"
    train(_classifier(network, output), folder, seed=0)
    state = torch.load(folder / "model_final.pth", weights_only=True)["model"]
    own = {name.partition("branches.0.model.")[2]: torch.as_tensor(tensor) for name, tensor in state.items()}
    path.parent.mkdir(exist_ok=True)
    with atomic_path(path) as aside:
        save_file({name: tensor for name, tensor in own.items() if name}, aside)


def _classifier(network: str, output: Path) -> Any:
    """LazyConfig that pretrains a network: the demo's classifier of the real digits, without a pyramid."""
    alone = PIIPConfig(branches=(_branch(network, _DIGIT_SIZE),), interaction=_ALONE, merging=None)
    cfg = LazyConfig.load(str(_CONFIGS / "piip_digits_classifier.py"))
    cfg.model.config = lazy_dataclass(ClassifierConfig(pyramid=alone, num_classes=10, pooling="average"))
    cfg.data.train.images, cfg.data.test.images = str(output / "digits/train"), str(output / "digits/val")
    cfg.data.image_size = _DIGIT_SIZE
    cfg.optimizer.lr, cfg.train.max_iter = 2e-3, _PRETRAINING_STEPS
    return cfg


def detector_config(config: PIIPConfig, output: Path, *, digit_scale: float = 1.0) -> Any:
    """LazyConfig of the demo's Mask R-CNN without masks, with all lengths in proportion to the image.

    Args:
        config: Of the backbone.
        output: Folder that `prepare` filled.
        digit_scale: Size of the digits relative to the image, over that in `SCENES`.
    """
    weights = (output / "pretrained" / f"{network}.safetensors" for network in NETWORKS)
    branches = (replace(b, pretrained=str(path)) for b, path in zip(config.branches, weights, strict=False))
    side = config.image_size
    cfg = LazyConfig.load(str(_CONFIGS / "piip_digits_mask_rcnn.py"))
    for split, name in (("train", "train"), ("test", "val")):
        cfg.data[split].annotations = str(output / f"{name}.json")
        cfg.data[split].images = str(output / "scenes" / name)
    cfg.data.train.scales = [[side, side]]
    cfg.dataloader.train.mapper.use_instance_mask = False
    cfg.dataloader.train.total_batch_size = _BATCH
    cfg.train.max_iter = _STEPS
    cfg.lr_multiplier.warmup_length = 20 / _STEPS

    backbone = cfg.model.backbone
    backbone.bottom_up.config = lazy_dataclass(replace(config, branches=tuple(branches)))
    backbone.bottom_up.pad_divisor, backbone.bottom_up.pretrained = max(_STRIDES), True
    backbone.in_features, backbone.out_channels = ["res1", "res2"], _CHANNELS
    rpn, heads, features = cfg.model.proposal_generator, cfg.model.roi_heads, ["p1", "p2"]
    rpn.in_features, rpn.head.in_channels, rpn.head.num_anchors = features, _CHANNELS, 4
    rpn.anchor_generator.strides = list(_STRIDES)
    rpn.anchor_generator.sizes = [[side * digit_scale * part for part in parts] for parts in ((0.1, 0.15), (0.21, 0.3))]
    for name in ("mask_in_features", "mask_pooler", "mask_head"):
        del heads[name]
    heads.box_in_features, heads.box_pooler.scales = features, [1 / stride for stride in _STRIDES]
    heads.box_pooler.canonical_box_size = side * digit_scale * 0.2
    heads.box_pooler.canonical_level = 2
    heads.box_head.input_shape.channels, heads.box_head.fc_dims = _CHANNELS, [128, 128]
    heads.box_predictor.input_shape.channels = 128
    return cfg


def train(cfg: Any, folder: Path, seed: int) -> dict[str, float]:
    """Trains and evaluates with tools/lazyconfig_train_net.py from the beginning; returns the metrics."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    cfg.train.output_dir, cfg.train.seed = str(folder), seed
    cfg.train.eval_period = cfg.train.checkpointer.period = cfg.train.max_iter
    leave_unchecked()  # saving looks at every value
    LazyConfig.save(cfg, str(folder / "claim.yaml"))
    # A fork has everything imported that the tool needs
    command = [str(_TRAIN), "--config-file", str(folder / "claim.yaml")]
    process = get_context("fork").Process(target=_run_tool, args=(command, folder / "output.txt"))
    process.start()
    process.join()
    if process.exitcode:
        raise UserError(f"training stopped with exit status {process.exitcode}: see {folder / 'output.txt'}")
    metrics: dict[str, float] = {}
    for line in (folder / "metrics.json").read_text().splitlines():
        metrics |= json.loads(line)
    return metrics


def _run_tool(command: list[str], log: Path) -> None:
    torch.set_num_threads(1)  # on tiny networks more threads lose
    sys.argv = command
    with open(log, "w") as file, redirect_stdout(file), redirect_stderr(file):
        runpy.run_path(command[0], run_name="__main__")
