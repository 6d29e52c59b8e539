"""Every ImageNet config loads, builds on the meta device, survives saving, and says what the zoo says."""

from pathlib import Path

import pytest
import torch

pytest.importorskip("detectron2")

from detectron2.config import LazyConfig, instantiate
from timm.data.auto_augment import AutoAugment, RandAugment
from timm.loss import BinaryCrossEntropy, SoftTargetCrossEntropy
from timm.optim import Lamb
from torchvision.transforms import ColorJitter

from piip.rows import apply_classification_row
from piip_core import ConfigError, zoo

CONFIGS = Path(__file__).parents[4] / "projects" / "PIIP" / "configs"
ROWS = {entry.config_file: entry for entry in zoo.classification_entries()}
TRAINING_IMAGES = 1_281_167


def test_there_is_one_config_per_row():
    assert {path.relative_to(CONFIGS).as_posix() for path in CONFIGS.glob("ImageNet/*.py")} == set(ROWS)


@pytest.mark.parametrize("file", ROWS)
def test_config(file, tmp_path):
    row, cfg = ROWS[file], LazyConfig.load(str(CONFIGS / file))
    assert cfg.train.load_pretrained is not row.from_scratch
    cfg.train.load_pretrained = False
    with torch.device("meta"):
        model = instantiate(cfg.model)
    assert model.config == row.training_config
    assert cfg.data.image_size == row.image_size and cfg.data.num_classes == 1000
    assert isinstance(model.loss, BinaryCrossEntropy if row.from_scratch else SoftTargetCrossEntropy)
    assert (model.mixup.mixup_alpha, model.mixup.cutmix_alpha) == (0.8, 1.0)
    assert model.mixup.label_smoothing == (0.0 if row.from_scratch else 0.1)
    transforms = instantiate(cfg.dataloader.train.mapper.transform).transforms
    kinds = {AutoAugment, ColorJitter} if row.from_scratch else {RandAugment}
    assert {type(t) for t in transforms} & {AutoAugment, ColorJitter, RandAugment} == kinds
    assert cfg.dataloader.train.repeats == (3 if row.from_scratch else 1)
    check_schedule(row, cfg)
    check_optimizer(row, cfg, model)

    LazyConfig.save(cfg, str(tmp_path / "config.yaml"))
    again = LazyConfig.load(str(tmp_path / "config.yaml"))
    assert instantiate(again.model.config) == row.training_config
    assert again.train.max_iter == cfg.train.max_iter
    again.data.train.num_images, again.dataloader.train.total_batch_size = 1000, 100  # an own folder
    assert (again.train.max_iter, again.train.eval_period) == (row.epochs * 10, 10)


@pytest.mark.parametrize("row", [row for row in ROWS.values() if row.checkpoint_url], ids=lambda row: row.name)
def test_published_models_are_as_released(row):
    cfg = LazyConfig.load(str(CONFIGS / "ImageNet" / "published" / f"{row.name}.py"))
    assert instantiate(cfg.model.config) == row.config and cfg.data.image_size == row.image_size
    assert row.config.pooling == "first_patch"


def check_schedule(row, cfg):
    epoch = TRAINING_IMAGES // row.batch_size
    assert cfg.train.max_iter == row.epochs * epoch
    assert cfg.train.eval_period == cfg.train.checkpointer.period == epoch
    assert cfg.train.ema.decay == row.ema_decay
    multiplier, base = instantiate(cfg.lr_multiplier), row.learning_rate
    rates = {epoch: base * multiplier(epoch / row.epochs) for epoch in (0, 2.5, row.epochs / 2, row.epochs)}
    assert rates == pytest.approx(
        {
            0: row.warmup_lr,
            2.5: (row.warmup_lr + base) / 2,
            row.epochs / 2: (row.min_lr + base) / 2,
            row.epochs: row.min_lr,
        }
    )


def check_optimizer(row, cfg, model):
    cfg.optimizer.params.model = model
    optimizer = instantiate(cfg.optimizer)
    del cfg.optimizer.params.model
    assert isinstance(optimizer, Lamb if row.from_scratch else torch.optim.AdamW)
    rates = {group["lr"] / row.learning_rate for group in optimizer.param_groups}
    assert sorted(rates) == pytest.approx(sorted({1.0, row.interaction_lr_ratio}))
    decays = {group["weight_decay"] for group in optimizer.param_groups}
    assert decays == ({0.0, row.weight_decay} if row.from_scratch else {row.weight_decay})


def test_a_row_and_the_recipe_of_others_do_not_mix():
    cfg = LazyConfig.load(str(CONFIGS / next(iter(ROWS))))
    nodes = {name: cfg[name] for name in ("model", "data", "dataloader", "optimizer", "lr_multiplier", "train")}
    scratch = next(row for row in ROWS.values() if row.from_scratch)
    with pytest.raises(ConfigError, match=r"expected train and optimizer from configs/common/from_scratch\.py"):
        apply_classification_row(scratch, **nodes)
