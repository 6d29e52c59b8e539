"""The published trainings: each function returns a model with its data, optimizer and schedule, as LazyConfig nodes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TypeAlias

import torch
from detectron2.config import LazyCall as L
from detectron2.config import LazyConfig
from detectron2.solver import WarmupParamScheduler, get_default_optimizer_params
from fvcore.common.param_scheduler import MultiStepParamScheduler, PolynomialDecayParamScheduler
from omegaconf import DictConfig
from timm.loss import BinaryCrossEntropy
from timm.optim import Lamb

from piip.lazy import lazy_dataclass
from piip.solver import CosineToMinimum, WarmupFactor, classifier_params, layer_decay_params
from piip_core import ClassifierConfig, zoo
from piip_core.errors import check_choice
from piip_core.zoo import ZooEntry

Nodes: TypeAlias = tuple[DictConfig, DictConfig, DictConfig, DictConfig, DictConfig, DictConfig]
"""model, data, dataloader, optimizer, lr_multiplier, train"""

COMMON = Path(__file__).parents[1] / "configs" / "common"
TRAIN_IMAGES = 117_266  # of 118287 in COCO train2017: those with annotations


def detector(
    entry: ZooEntry | str,
    *,
    scale: tuple[int, int] | None = None,
    crop: int | None = None,
    batch_size: int = 16,
    lr: float = 1e-4,
    layer_decay: float | None = 0.85,
    epochs: int = 12,
    lr_drops: Sequence[int] = (8, 11),
) -> Nodes:
    """Mask R-CNN, Cascade Mask R-CNN or DINO on COCO: AdamW, learning rate in steps, evaluation after every epoch.

    The defaults are what most published detectors were trained with.

    Args:
        entry: Backbone, head, and normalisation and padding of the images; or the name of a published model.
        scale: Long and short side that images just fit into; test images only if there is a crop. None: 1333 x 800 in
            proportion to the crop or, without, to the largest image of the pyramid.
        crop: Side of the crop of DETR's multi-scale training, whose resizing follows in proportion
            (at 1024: short sides of 480 to 800); None trains at `scale`.
        batch_size: Images per iteration, over all GPUs.
        lr: Learning rate of heads and interactions at that batch size.
        layer_decay: Factor of the learning rate per layer, from the last layer down. None: one rate for all, and
            weight decay on all parameters.
        epochs: Passes over the training images.
        lr_drops: Epochs after which the learning rate falls to a tenth.

    Raises:
        ConfigError: If the head of `entry` is no detector.
    """
    entry = zoo.get(entry) if isinstance(entry, str) else entry
    model = _dense_model(entry, "mask_rcnn", "cascade_mask_rcnn", "dino")
    data, dataloader = _common("coco" if crop is None else "coco_ms", "data", "dataloader")
    if scale is None:
        largest = max(branch.image_size for branch in entry.config.branches)
        scale = (largest, largest * 800 // 1333) if crop is None else (crop * 1333 // 1024, crop * 800 // 1024)
    if crop is None:
        data.train.scales = [scale]  # also the test scale
    else:
        data.train.crop, data.test.scales = crop, [scale]
    dataloader.train.total_batch_size = batch_size
    dataloader.train.mapper.use_instance_mask = entry.head != "dino"  # which learns from boxes alone

    epoch = math.ceil(TRAIN_IMAGES / batch_size)
    train = _train(f"output/{entry.config_name}", max_iter=epochs * epoch, period=epoch)
    lr_multiplier = L(WarmupParamScheduler)(
        scheduler=L(MultiStepParamScheduler)(
            values=[0.1**drop for drop in range(len(lr_drops) + 1)],
            milestones=[drop * epoch for drop in lr_drops],
            num_updates=train.max_iter,
        ),
        warmup_length=500 / train.max_iter,
        warmup_factor=0.001,
    )
    return model, data, dataloader, _adamw(lr, layer_decay), lr_multiplier, train


def segmentor(
    entry: ZooEntry | str, *, crop: int, batch_size: int = 16, lr: float, layer_decay: float, max_iter: int
) -> Nodes:
    """UperNet on ADE20K: AdamW, learning rate falling in a line to 0.

    Args:
        entry: As for `detector`.
        crop: Side of training crops, of test images (the short one), and of the windows in inference.
        batch_size: Images per iteration, over all GPUs.
        lr: Learning rate of heads and interactions at that batch size.
        layer_decay: Factor of the learning rate per layer, from the last layer down.
        max_iter: Iterations.

    Raises:
        ConfigError: If the head of `entry` is no segmentor.
    """
    entry = zoo.get(entry) if isinstance(entry, str) else entry
    model = _dense_model(entry, "upernet")
    data, dataloader = _common("ade20k", "data", "dataloader")
    data.train.scale, data.train.crop = [4 * crop, crop], [crop, crop]
    data.test.short_side = model.train_size = model.window = crop
    model.stride = crop * 2 // 3
    dataloader.train.total_batch_size = batch_size
    lr_multiplier = L(WarmupFactor)(
        scheduler=L(PolynomialDecayParamScheduler)(base_value=1.0, power=1.0),
        warmup_iters=1500,
        warmup_factor=1e-6,
        max_iter="${train.max_iter}",
    )
    train = _train(f"output/{entry.config_name}", max_iter=max_iter, period=8_000)
    return model, data, dataloader, _adamw(lr, layer_decay), lr_multiplier, train


def classifier(
    config: ClassifierConfig | str,
    *,
    batch_size: int,
    lr: float,
    interaction_lr_ratio: float = 1.0,
    weight_decay: float,
    epochs: float,
    warmup_epochs: float,
    ema_decay: float | None,
    from_scratch: bool = False,
    output_dir: str = "",
) -> Nodes:
    """A classifier on ImageNet-1K: AdamW, learning rate falling along a cosine, evaluation after every epoch.

    Epochs are those of the training images, however many there are (`data.train.num_images`).

    Args:
        config: The classifier; its classes are those of the data. Or the name of a published one.
        batch_size: Images per iteration, over all GPUs.
        lr: Learning rate of the branches at that batch size.
        interaction_lr_ratio: Learning rate of all other parameters over that of the branches and their heads.
        weight_decay: Of all parameters.
        epochs: Passes over the training images.
        warmup_epochs: Those over which the learning rate rises.
        ema_decay: Of the moving average of the weights, per iteration; None without.
        from_scratch: Start from random weights, with what DeiT III's recipe for ViT-B (arXiv 2204.07118) has instead of
            that of fine-tuning: 3-Augment three times per image, binary cross-entropy, LAMB.
        output_dir: Where checkpoints go; for a published classifier, output/ and the name of its config.
    """
    if isinstance(config, str):
        entry = zoo.classification(config)
        config, output_dir = entry.training_config, f"output/{Path(entry.config_file).stem}"
    (model,) = _common("classifier", "model")
    model.config = lazy_dataclass(config)
    model.config.num_classes = "${data.num_classes}"
    data, dataloader = _common("imagenet", "data", "dataloader")
    data.image_size = config.image_size
    dataloader.train.total_batch_size = batch_size

    batches = "${data.train.num_images},${dataloader.train.total_batch_size}"
    epoch = f"${{piip.iterations:1,{batches}}}"
    train = _train(output_dir, max_iter=f"${{piip.iterations:${{train.epochs}},{batches}}}", period=epoch)
    train.epochs, train.warmup_epochs, train.ema.decay = epochs, warmup_epochs, ema_decay
    lr_multiplier = L(CosineToMinimum)(
        max_iter="${train.max_iter}",
        warmup_iters=f"${{piip.iterations:${{train.warmup_epochs}},{batches}}}",
        warmup_lr=1e-6,
        min_lr=1e-5,
    )
    params = L(classifier_params)(
        # params.model is set by the training script
        base_lr="${..lr}",
        weight_decay="${..weight_decay}",
        interaction_lr_ratio=interaction_lr_ratio,
        head_lr_ratio=1.0,  # 10 or more for new classes
        decay_vectors=True,  # as published; False exempts biases, norms, position embeddings and class tokens
    )
    optimizer = L(torch.optim.AdamW)(params=params, lr=lr, betas=(0.9, 0.999), weight_decay=weight_decay)
    if from_scratch:
        train.load_pretrained = False
        dataloader.train.repeats = 3
        dataloader.train.mapper.transform.auto_augment = "3a"  # one of grey, solarised and blurred
        model.label_smoothing = 0.0
        # Every class that is in the mixed image is to be found, whatever its share
        model.loss = L(BinaryCrossEntropy)(smoothing="${..label_smoothing}", target_threshold=0.0)
        params.decay_vectors = False
        optimizer = L(Lamb)(params=params, lr=lr, weight_decay=weight_decay)
    return model, data, dataloader, optimizer, lr_multiplier, train


def _common(file: str, *names: str) -> tuple[DictConfig, ...]:
    """Fresh nodes of a file of configs/common."""
    return LazyConfig.load(str(COMMON / f"{file}.py"), names)


def _dense_model(entry: ZooEntry, *heads: str) -> DictConfig:
    check_choice(f"{entry.name}: head", entry.head, heads)
    (model,) = _common(entry.head, "model")
    backbone = model.backbone.get("bottom_up", model.backbone)  # below an FPN, or alone
    backbone.config = lazy_dataclass(entry.config)
    backbone.pad_divisor = entry.pad_divisor
    model.pixel_mean, model.pixel_std = list(entry.pixel_mean), list(entry.pixel_std)
    return model


def _train(output_dir: str, *, max_iter: int | str, period: int | str) -> DictConfig:
    (train,) = _common("train", "train")
    train.max_iter, train.eval_period = max_iter, period
    train.checkpointer = {"period": period, "max_to_keep": 3}
    train.amp.enabled = True  # in bfloat16, as the published backbones
    train.output_dir = output_dir
    return train


def _adamw(lr: float, layer_decay: float | None) -> DictConfig:
    # params.model is set by the training script
    rates = {"base_lr": "${..lr}", "weight_decay": "${..weight_decay}"}
    if layer_decay is None:
        params = L(get_default_optimizer_params)(**rates, weight_decay_norm="${..weight_decay}")
    else:
        params = L(layer_decay_params)(**rates, decay_rate=layer_decay)
    return L(torch.optim.AdamW)(params=params, lr=lr, betas=(0.9, 0.999), weight_decay=0.05)
