"""The LazyConfig of a training on own data: a recipe of this project, fitted to the data and the machine."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NamedTuple

import torch
from detectron2.config import LazyConfig
from omegaconf import DictConfig, OmegaConf

from piip.data.folders import OwnData
from piip.lazy import lazy_dataclass
from piip.lazy_config import load_config, training_size
from piip.tracking import TRACKERS
from piip_core import zoo
from piip_core.errors import ConfigError, OutputFolderError, check, check_choice
from piip_core.files import explain_write_errors

CONFIGS = Path(__file__).parents[1] / "configs"
TASKS = ("detect", "segment", "semantic", "classify")
TINY = "tiny"
"""The demo's three-branch pyramid: trains in minutes on a CPU."""
DEFAULT_MODELS = {
    "detect": "piip_tsb_1120_896_448",
    "segment": "piip_tsb_1120_896_448",
    "semantic": "piip_tsb_896_448_336_upernet",
    "classify": "piip_tsb_368_192_128",
}
_HEADS = {
    "mask_rcnn": ("segment", "detect"),
    "cascade_mask_rcnn": ("segment",),
    "dino": ("detect",),
    "upernet": ("semantic",),
}
_TINY = {"detect": "mask_rcnn", "segment": "mask_rcnn", "semantic": "upernet", "classify": "classifier"}
_METRICS = {"detect": "bbox/AP", "segment": "segm/AP", "semantic": "sem_seg/mIoU", "classify": "classification/top1"}
_TAUGHT = {"segment": ("segment", "detect")}  # what data can teach beside their own task
_ITERATIONS, _LONGEST, _EVALUATIONS = 5000, 100, 20
_LOWEST_RATE = 0.25  # over the recipe's, which for 1024 images of ImageNet is low already
_CPU_PIXELS = 10**6  # of the images that pass a model on a CPU at a time


@dataclass(frozen=True, kw_only=True)
class TrainOptions:
    """What may be said of a training; see `piip train --help`.

    Attributes:
        task: One of `TASKS`; None: the most that the data can teach.
        epochs: None: as many as give 5000 iterations, from 12 (the recipe's) to 100.
        batch: Images per iteration; None: the recipe's, or an eighth of the images.
        image_size: Long side that images are resized to; None: the recipe's.
        freeze: "branches" or "all-but-heads" are not trained.
        lora: Rank of adapters that are trained in place of the branches' linear layers.
        patience: Evaluations without a better score after which training ends.
        ema: Decay of an average of the weights.
        weights: "released" (with the task's heads, where there are), "branches" (pretrained), "random", or a file.
        device: "cpu", "cuda"; None: a GPU if there is one.
        gpus: Processes.
        track: Where curves go: one of `piip.tracking.TRACKERS`.
        seed: Of all that is random; of the split as well.
        overrides: Further settings of the LazyConfig, "key=value".
    """

    task: str | None = None
    epochs: float | None = None
    batch: int | None = None
    image_size: int | None = None
    freeze: str | None = None
    lora: int | None = None
    patience: int | None = None
    ema: float | None = None
    weights: str = "released"
    device: str | None = None
    gpus: int = 1
    track: str = "tensorboard"
    seed: int = 0
    overrides: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in ("epochs", "batch", "image_size", "patience", "gpus", "lora"):
            value = getattr(self, name)
            check(value is None or value > 0, name.replace("_", "-"), value, "a positive number")
        check(self.image_size is None or self.image_size >= 32, "image-size", self.image_size, "at least 32")
        if self.task is not None:
            check_choice("task", self.task, TASKS)
        check_choice("track", self.track, TRACKERS)


class Model(NamedTuple):
    """A model that can be named: for which tasks, its config, and what is known of it."""

    name: str
    tasks: tuple[str, ...]
    config_file: Path
    entry: zoo.ZooEntry | zoo.ClassificationEntry | None = None


def models() -> Iterator[Model]:
    """All models by name."""
    for task in TASKS:
        yield Model(TINY, (task,), CONFIGS / "demo" / f"piip_digits_{_TINY[task]}.py")
    for entry in zoo.entries():
        yield Model(entry.name, _HEADS[entry.head], CONFIGS / entry.config_file, entry)
    for classifier in zoo.classification_entries():
        yield Model(classifier.name, ("classify",), CONFIGS / classifier.config_file, classifier)


def find_model(name: str, task: str | None = None) -> Model:
    """A model by name, `piip_` in front or not, or by that of its released file; of "tiny" that for the task.

    Raises:
        ConfigError: For an unknown name, whose closest ones it lists, or one that is not for the task.
    """
    known = {model.name: model for model in models() if model.name != TINY or task in (None, *model.tasks)}
    name = {released.name: released.entry.name for released in zoo.released_models()}.get(name, name)
    if name not in known and f"piip_{name}" in known:
        name = f"piip_{name}"
    if name not in known:
        close = get_close_matches(name, [*known, *(each.removeprefix("piip_") for each in known)])
        raise ConfigError(f"no model is named {name!r}: `piip models` lists all; close are {', '.join(close) or TINY}")
    if task is not None and task not in known[name].tasks:
        good = next(iter(known[name].tasks))
        raise ConfigError(
            f"model {name} is for {good}, not for {task}: `piip models --task {task}` lists those that are"
        )
    return known[name]


def compose(data: OwnData, name: str | None, output: str | Path, options: TrainOptions) -> tuple[DictConfig, list[str]]:
    """A LazyConfig that trains a model on own data, and in a few lines what was chosen.

    Raises:
        ConfigError: If model, task and data do not go together.
    """
    task = options.task or data.task
    taught = _TAUGHT.get(data.task, (data.task,))
    check(task in taught, "task", task, f"{' or '.join(taught)}: that is what the data ({data.form}) have")
    model = find_model(name or DEFAULT_MODELS[task], task)
    cfg = load_config(str(model.config_file))
    for key, value in data.settings.items():
        OmegaConf.update(cfg, key, value)
    train = cfg.train
    train.output_dir, train.seed, train.freeze = str(output), options.seed, options.freeze
    train.lora = options.lora
    train.report, train.track = True, options.track
    train.device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    train.amp.enabled = train.amp.enabled and train.device != "cpu"
    if train.device == "cpu":
        cfg.dataloader.train.num_workers = cfg.dataloader.test.num_workers = 0
    start = _start(cfg, model, options)
    _fit_model(cfg, model, task, options)
    lines = [_fit_batch(cfg, task, data.counts[0], options), _fit_schedule(cfg, model, data.counts[0], options)]
    train.ema.decay, train.ema.use_warmup = options.ema, True
    prefix = "" if options.ema is None else "ema/"
    train.best = {"metric": prefix + _METRICS[task], "patience": options.patience}
    return cfg, [f"{model.name} for {task}, {start}, on {train.device}", *lines]


def _fit_model(cfg: DictConfig, model: Model, task: str, options: TrainOptions) -> None:
    """Heads for the task, and image sizes."""
    if task == "detect" and "mask_head" in cfg.model.get("roi_heads", {}):
        cfg.dataloader.train.mapper.use_instance_mask = False
        for part in ("mask_in_features", "mask_pooler", "mask_head"):
            cfg.model.roi_heads[part] = None
    if task == "semantic":
        for head in (cfg.model.sem_seg_head, cfg.model.auxiliary_head):  # torch's own wants several GPUs
            head.norm = "BN" if options.gpus == 1 else head.norm if cfg.train.device != "cpu" else "naiveSyncBN"
    if model.name == TINY and "backbone" in cfg.model and task != "semantic":
        cfg.model.backbone.bottom_up.pad_divisor = 32  # whole patches in all branches, whatever the images
    size = options.image_size
    if size is None:
        return
    if cfg.data.kind == "class_folders":
        branches = list(cfg.model.config.pyramid.branches.values())
        branches = [branch for branch in branches if OmegaConf.is_config(branch)]
        largest = max(branch.image_size for branch in branches)
        for branch in branches:
            patch = branch.network.get("patch_size", 32)
            branch.image_size = max(round(branch.image_size * size / largest / patch), 1) * patch
        cfg.data.image_size = max(branch.image_size for branch in branches)
    elif cfg.data.kind == "label_maps":
        cfg.data.train.crop, cfg.data.test.short_side = [size, size], size
        if "scale" in cfg.data.train:
            cfg.data.train.scale = [4 * size, size]
        cfg.model.train_size = cfg.model.window = size
        cfg.model.stride = max(size * 2 // 3, 1)
    elif "crop" in cfg.data.train:
        cfg.data.train.crop, cfg.data.test.scales = size, [[size, size]]
    else:
        cfg.data.train.scales = [[size, size]]


def _start(cfg: DictConfig, model: Model, options: TrainOptions) -> str:
    """Sets the weights to start from, and says which."""
    released = {found.entry.name for found in zoo.released_models()}
    weights, cfg.train.init_checkpoint = options.weights, ""
    if weights == "released" and model.name in released:
        cfg.train.init_checkpoint = model.name
        if isinstance(model.entry, zoo.ClassificationEntry):  # whose weights go with heads that new ones do not have
            cfg.model.config = lazy_dataclass(model.entry.config)
            cfg.model.config.num_classes = "${data.num_classes}"
        return "from its released weights"
    if weights == "random" or (model.name == TINY and weights in ("released", "branches")):
        cfg.train.load_pretrained = False
        return "from random weights"
    if weights in ("released", "branches"):
        return "from pretrained branches"
    cfg.train.init_checkpoint = weights
    return f"from {weights}"


def _fit_batch(cfg: DictConfig, task: str, images: int, options: TrainOptions) -> str:
    """Images per iteration, how many of them at a time, and the learning rate for that."""
    loader, gpus = cfg.dataloader.train, options.gpus
    recipe = loader.total_batch_size
    batch = options.batch or min(recipe, 2 ** int(math.log2(max(images // 8, 2))))
    least = 1 if task in ("detect", "segment") else 2  # mixup takes pairs, batch norms of pooled maps several
    step = gpus * least
    batch = -(-batch // step) * step
    if options.batch and batch != options.batch:
        raise ConfigError(f"batch={options.batch}: expected a multiple of {step}")
    loader.total_batch_size = batch
    part = batch // gpus
    if cfg.train.device == "cpu":
        fitting = _CPU_PIXELS // math.prod(training_size(cfg))
        part = min(part, max(fitting - fitting % least, least))
    if part < batch // gpus or cfg.train.device != "cpu":  # a GPU's memory is measured by the training itself
        cfg.train.micro_batch = part
    factor = max(math.sqrt(batch / recipe), _LOWEST_RATE)
    cfg.optimizer.lr *= factor
    for name in ("warmup_lr", "min_lr"):
        if name in cfg.lr_multiplier:
            cfg.lr_multiplier[name] *= factor
    if "head_lr_ratio" in cfg.optimizer.params and cfg.train.load_pretrained:
        cfg.optimizer.params.head_lr_ratio = 10.0  # new classes
    parts = f", {part} at a time" if part < batch // gpus else ""
    return f"batch {batch}{parts}, learning rate {cfg.optimizer.lr:.2g} (the recipe's at {recipe} times {factor:.2g})"


def _fit_schedule(cfg: DictConfig, model: Model, images: int, options: TrainOptions) -> str:
    """Length, warmup, and how often it is evaluated and saved; drops of the rate come at the same parts of it."""
    train, batch = cfg.train, cfg.dataloader.train.total_batch_size
    before = train.max_iter  # of the recipe
    by_epochs = "epochs" in train  # which leaves out the images of a batch that is not full
    epoch = max(images // batch, 1) if by_epochs else math.ceil(images / batch)
    wanted = before if model.name == TINY else _ITERATIONS
    epochs = options.epochs or min(max(math.ceil(wanted / epoch), 12), _LONGEST)
    length = max(round(epochs * epoch), 1)
    schedule = cfg.lr_multiplier
    if "warmup_length" in schedule:
        schedule.warmup_length = min(schedule.warmup_length * before, length / 10) / length
    if by_epochs:
        train.warmup_epochs, train.epochs = min(train.warmup_epochs, epochs / 10), epochs
        cfg.data.train.num_images = images
    else:
        if "warmup_iters" in schedule:
            schedule.warmup_iters = min(schedule.warmup_iters, length // 10)
        train.max_iter = length
    period = min(epoch * math.ceil(epochs / _EVALUATIONS), length)
    train.eval_period, train.checkpointer = period, {"period": period, "max_to_keep": 2}
    train.log_period = min(20, period)
    return f"{epochs:g} epochs, {length} iterations, evaluated every {period}"


def write_config(cfg: DictConfig, output: Path) -> Path:
    """Writes a LazyConfig as the `config.yaml` of a run, which may go on with another length but not another model.

    Raises:
        OutputFolderError: If the folder has a run of another model.
    """
    file, new = output / "config.yaml", output / "composed.yaml"
    output.mkdir(parents=True, exist_ok=True)
    with explain_write_errors(new):
        LazyConfig.save(cfg, str(new))
    models = [_model_of(path) for path in (file, new) if path.is_file()]
    if (output / "last_checkpoint").is_file() and models[0] != models[-1]:
        new.unlink()
        raise OutputFolderError(f"{output}: holds a training of another model or task: name another --output")
    os.replace(new, file)
    return file


def _model_of(file: Path) -> Any:
    return OmegaConf.to_container(LazyConfig.load(str(file)).model, resolve=False)
