"""Rows of the zoo put into configs: schedule, optimizer and image scales, and what is refused."""

import dataclasses
from pathlib import Path

import pytest
import torch

pytest.importorskip("detectron2")

from detectron2.config import instantiate

from piip.lazy_config import load_config
from piip.rows import apply_row
from piip_core import ConfigError, zoo

COMMON = Path(__file__).parents[3] / "projects" / "PIIP" / "configs" / "common"
PARTS = ("model", "data", "dataloader", "optimizer", "lr_multiplier", "train")
ROW = zoo.get("vit_b_1024")


def parts(data="coco.py"):
    """Fresh nodes for `apply_row`, by their names."""
    files = [load_config(str(COMMON / name)) for name in ("mask_rcnn.py", data, "schedule_1x.py")]
    return {key: file[key] for file in files for key in PARTS if key in file}


def published_factor(iteration, epoch, drops, warmup_iters, warmup_factor):
    """Step schedule with linear warmup, by the published rule."""
    factor = 0.1 ** sum(iteration >= drop * epoch for drop in drops)
    if iteration < warmup_iters:
        factor *= 1 - (1 - iteration / warmup_iters) * (1 - warmup_factor)
    return factor


@pytest.mark.parametrize(
    ("changes", "epoch"),
    [
        ({}, 7330),
        ({"epochs": 36, "lr_drops": (27, 33)}, 7330),
        ({"batch_size": 32, "learning_rate": 2e-4}, 3665),
        ({"epochs": 5, "lr_drops": (4,), "warmup_iters": 1000, "warmup_factor": 0.01}, 7330),
    ],
)
def test_learning_rate_of_every_phase(changes, epoch):
    row, cfg = dataclasses.replace(ROW, **changes), parts()
    apply_row(row, **cfg)
    length = row.epochs * epoch
    assert cfg["train"].max_iter == length
    assert cfg["train"].eval_period == cfg["train"].checkpointer.period == epoch
    assert cfg["dataloader"].train.total_batch_size == row.batch_size
    assert cfg["optimizer"].lr == row.learning_rate
    multiplier = instantiate(cfg["lr_multiplier"])
    edges = [0, row.warmup_iters, *(drop * epoch for drop in row.lr_drops), length - 1]
    iterations = sorted({min(max(edge + k, 0), length - 1) for edge in edges for k in (-1, 0, 1, 250)})
    expected = [published_factor(i, epoch, row.lr_drops, row.warmup_iters, row.warmup_factor) for i in iterations]
    assert [multiplier(i / length) for i in iterations] == pytest.approx(expected, rel=1e-6)


def test_schedule_3x_alone_is_three_times_schedule_1x():
    one, three = (load_config(str(COMMON / f"schedule_{k}x.py")) for k in (1, 3))
    assert three.train.max_iter == 3 * one.train.max_iter == 36 * 7330
    multiplier = instantiate(three.lr_multiplier)
    steps = [0, 250, 500, 27 * 7330 - 1, 27 * 7330, 33 * 7330 - 1, 33 * 7330]
    expected = [published_factor(step, 7330, (27, 33), 500, 0.001) for step in steps]
    assert [multiplier(step / three.train.max_iter) for step in steps] == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("decay", [None, 0.5])
def test_without_layer_decay_everything_decays(decay):
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 1), torch.nn.BatchNorm2d(4), torch.nn.LayerNorm(4))
    cfg = parts()
    apply_row(dataclasses.replace(ROW, layer_decay=decay, learning_rate=3e-4), **cfg)
    cfg["optimizer"].params.model = model
    optimizer = instantiate(cfg["optimizer"])
    decays = {p: group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert {group["lr"] for group in optimizer.param_groups} == {3e-4}
    expected = {p: 0.05 if decay is None or p.ndim > 1 else 0.0 for p in model.parameters()}
    assert decays == expected


@pytest.mark.parametrize(("crop", "data", "wanted"), [(1024, "coco.py", "coco_ms"), (None, "coco_ms.py", "coco")])
def test_data_of_the_other_kind_is_refused(crop, data, wanted):
    with pytest.raises(ConfigError, match=rf"vit_b_1024: .*configs/common/{wanted}\.py"):
        apply_row(dataclasses.replace(ROW, training_crop=crop), **parts(data))


def test_multi_scale_rows_set_the_crop_and_the_test_scale():
    cfg = parts("coco_ms.py")
    apply_row(dataclasses.replace(ROW, image_scale=None, training_crop=1536), **cfg)
    assert cfg["data"].train.crop == 1536
    assert cfg["data"].test.scales == [[1999, 1200]]
    assert "scales" not in cfg["data"].train


def test_crop_and_test_scale_can_be_overridden_on_the_command_line():
    overrides = ["data.train.crop=512", "data.test.scales=[[666,400]]"]
    cfg = load_config(str(COMMON / "coco_ms.py"), overrides)
    _, crop = instantiate(cfg.dataloader.train.mapper.augmentations)
    assert crop.crop == 512
    (test,) = instantiate(cfg.dataloader.test.mapper.augmentations)
    assert test.scales == [(666, 400)]
    with pytest.raises(ConfigError, match=r"data\.train\.scales"):
        load_config(str(COMMON / "coco_ms.py"), ["data.train.scales=[[64,48]]"])
