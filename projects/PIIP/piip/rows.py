"""Puts the facts of a published row (`piip_core.zoo`) into the parts of a LazyConfig."""

from __future__ import annotations

from collections.abc import Sequence

from detectron2.config import LazyCall
from detectron2.solver import get_default_optimizer_params
from omegaconf import DictConfig

from piip.lazy import lazy_dataclass
from piip_core import ConfigError
from piip_core.zoo import ClassificationEntry, DetectionEntry, SegmentationEntry

__all__ = ["apply_classification_row", "apply_row", "set_schedule"]

TRAIN_IMAGES = 117_266  # of 118287 in COCO train2017: those with annotations


def apply_row(
    row: DetectionEntry | SegmentationEntry,
    *,
    model: DictConfig,
    data: DictConfig,
    dataloader: DictConfig,
    optimizer: DictConfig,
    lr_multiplier: DictConfig,
    train: DictConfig,
) -> None:
    """Sets backbone, padding, normalisation, image scales, optimizer and schedule of a published model, in place.

    Args:
        row: From `piip_core.zoo.get(NAME)`.
        model: A model of `configs/common` for the row's head.
        data: The `data` node of `configs/common/coco.py`, of `coco_ms.py` for a row with multi-scale training, or of
            `ade20k.py` for segmentation.
        dataloader: From the same file.
        optimizer: The optimizer of `configs/common/schedule_1x.py`, or of `schedule_80k.py` for segmentation.
        lr_multiplier: From the same file.
        train: From the same file.

    Raises:
        ConfigError: If `data` is of the other kind.
    """
    backbone = model.backbone.get("bottom_up", model.backbone)  # below an FPN, or alone
    backbone.config = lazy_dataclass(row.config)
    backbone.pad_divisor = row.pad_divisor
    model.pixel_mean = list(row.pixel_mean)
    model.pixel_std = list(row.pixel_std)
    dataloader.train.total_batch_size = row.batch_size
    optimizer.lr = row.learning_rate
    optimizer.weight_decay = row.weight_decay
    if row.layer_decay is None:  # plain AdamW: everything decays
        optimizer.params = LazyCall(get_default_optimizer_params)(
            base_lr="${..lr}", weight_decay="${..weight_decay}", weight_decay_norm="${..weight_decay}"
        )
    else:
        optimizer.params.decay_rate = row.layer_decay
    train.output_dir = f"output/{row.config_name}"
    if isinstance(row, SegmentationEntry):
        _set_segmentation(row, model, data, train, lr_multiplier)
    else:
        _set_detection(row, data, train, lr_multiplier)


def apply_classification_row(
    row: ClassificationEntry,
    *,
    model: DictConfig,
    data: DictConfig,
    dataloader: DictConfig,
    optimizer: DictConfig,
    lr_multiplier: DictConfig,
    train: DictConfig,
) -> None:
    """Sets model, image size, optimizer and schedule of a published classifier, in place.

    Args:
        row: From `piip_core.zoo.classification(NAME)`; its model is the one for new trainings.
        model: The model of `configs/common/classifier.py`, or of `from_scratch.py`.
        data: The `data` node of `configs/common/imagenet.py`, or of `from_scratch.py`.
        dataloader: From the same file.
        optimizer: The optimizer of `configs/common/schedule_20ep.py`, or of `from_scratch.py`.
        lr_multiplier: From the same file.
        train: From the same file.

    Raises:
        ConfigError: If `train` is of the other kind.
    """
    if train.load_pretrained == row.from_scratch:
        wanted = "from_scratch.py" if row.from_scratch else "schedule_20ep.py"
        raise ConfigError(f"{row.name}: expected train and optimizer from configs/common/{wanted}")
    model.config = lazy_dataclass(row.training_config)
    model.config.num_classes = "${data.num_classes}"
    data.image_size = row.image_size
    dataloader.train.total_batch_size = row.batch_size
    optimizer.lr = row.learning_rate
    optimizer.weight_decay = row.weight_decay
    optimizer.params.interaction_lr_ratio = row.interaction_lr_ratio
    lr_multiplier.warmup_lr = row.warmup_lr
    lr_multiplier.min_lr = row.min_lr
    train.epochs = row.epochs
    train.warmup_epochs = row.warmup_epochs
    train.ema.decay = row.ema_decay
    train.output_dir = f"output/{row.config_name}"


def _set_detection(row: DetectionEntry, data: DictConfig, train: DictConfig, lr_multiplier: DictConfig) -> None:
    _set_scales(row, data)
    set_schedule(
        train,
        lr_multiplier,
        epochs=row.epochs,
        lr_drops=row.lr_drops,
        batch_size=row.batch_size,
        warmup_iters=row.warmup_iters,
    )
    lr_multiplier.warmup_factor = row.warmup_factor


def _set_segmentation(
    row: SegmentationEntry, model: DictConfig, data: DictConfig, train: DictConfig, lr_multiplier: DictConfig
) -> None:
    side = row.crop_size
    data.train.scale = [4 * side, side]
    data.train.crop = [side, side]
    data.test.short_side = model.train_size = model.window = side
    model.stride = row.stride
    train.max_iter = row.iterations
    lr_multiplier.warmup_iters = row.warmup_iters
    lr_multiplier.warmup_factor = row.warmup_factor


def set_schedule(
    train: DictConfig,
    lr_multiplier: DictConfig,
    *,
    epochs: int,
    lr_drops: Sequence[int],
    batch_size: int,
    warmup_iters: int = 500,
) -> None:
    """Sets the length of training on COCO, in place; saves and evaluates after every epoch.

    Args:
        train: The `train` node of `configs/common/schedule_1x.py`.
        lr_multiplier: The multiplier of the same file.
        epochs: Passes over the training images.
        lr_drops: Epochs after which the learning rate falls to a tenth.
        batch_size: Images per iteration, over all GPUs.
        warmup_iters: Iterations over which the learning rate rises to its full value.
    """
    epoch = -(-TRAIN_IMAGES // batch_size)
    train.max_iter = epochs * epoch
    train.eval_period = train.checkpointer.period = epoch
    lr_multiplier.scheduler.values = [0.1**drop for drop in range(len(lr_drops) + 1)]
    lr_multiplier.scheduler.milestones = [drop * epoch for drop in lr_drops]
    lr_multiplier.scheduler.num_updates = train.max_iter
    lr_multiplier.warmup_length = warmup_iters / train.max_iter


def _set_scales(row: DetectionEntry, data: DictConfig) -> None:
    scale = [row.long_side, row.short_side]
    multi_scale = "crop" in data.train
    if multi_scale != (row.training_crop is not None):
        wanted = "coco_ms.py" if row.training_crop is not None else "coco.py"
        raise ConfigError(f"{row.name}: expected data and dataloader from configs/common/{wanted}")
    if multi_scale:
        data.train.crop = row.training_crop
        data.test.scales = [scale]
    else:
        data.train.scales = [scale]  # also the test scale
