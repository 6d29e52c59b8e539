"""Every ImageNet config loads, builds on the meta device, survives saving, and trains as published."""

import json
from pathlib import Path

import pytest
import torch

pytest.importorskip("detectron2")

from detectron2.config import LazyConfig, instantiate
from timm.data.auto_augment import AutoAugment, RandAugment
from timm.loss import BinaryCrossEntropy, SoftTargetCrossEntropy
from timm.optim import Lamb
from torchvision.transforms import ColorJitter

from piip_core import zoo

ROOT = Path(__file__).parents[4]
CONFIGS = ROOT / "projects" / "PIIP" / "configs"
SETTINGS = json.loads((ROOT / "tests" / "data" / "classification_settings.json").read_text())
ENTRIES = {entry.config_file: entry for entry in zoo.classification_entries()}
TRAINING_IMAGES = 1_281_167
# Baselines of the paper are trained as its models are, without interactions
FINE_TUNED = SETTINGS["piip_tsb_368_192_128"]["train"] | {"interaction_lr_ratio": 1.0}
# In the paper only: DeiT III's recipe for ViT-B from scratch, README_revenge.md of its code
FROM_SCRATCH = {
    "epochs": 300,
    "batch_size": 2048,
    "lr": 3e-3,
    "interaction_lr_ratio": 1.0,
    "weight_decay": 0.05,
    "ema_decay": None,
}


def test_there_is_one_config_per_model():
    assert {path.relative_to(CONFIGS).as_posix() for path in CONFIGS.glob("ImageNet/*.py")} == set(ENTRIES)


@pytest.mark.parametrize("file", ENTRIES)
def test_config(file, tmp_path):
    entry, cfg = ENTRIES[file], LazyConfig.load(str(CONFIGS / file))
    from_scratch = entry.schedule == "300ep"
    recipe = SETTINGS[entry.name]["train"] if entry.name in SETTINGS else FROM_SCRATCH if from_scratch else FINE_TUNED
    assert cfg.train.load_pretrained is not from_scratch and cfg.train.output_dir == f"output/{Path(file).stem}"
    cfg.train.load_pretrained = False
    with torch.device("meta"):
        model = instantiate(cfg.model)
    assert model.config == entry.training_config
    assert cfg.data.image_size == entry.image_size and cfg.data.num_classes == 1000
    assert isinstance(model.loss, BinaryCrossEntropy if from_scratch else SoftTargetCrossEntropy)
    assert (model.mixup.mixup_alpha, model.mixup.cutmix_alpha) == (0.8, 1.0)
    assert model.mixup.label_smoothing == (0.0 if from_scratch else 0.1)
    transforms = instantiate(cfg.dataloader.train.mapper.transform).transforms
    kinds = {AutoAugment, ColorJitter} if from_scratch else {RandAugment}
    assert {type(t) for t in transforms} & {AutoAugment, ColorJitter, RandAugment} == kinds
    assert cfg.dataloader.train.repeats == (3 if from_scratch else 1)
    assert cfg.dataloader.train.total_batch_size == recipe["batch_size"]
    check_schedule(recipe, cfg)
    check_optimizer(recipe, cfg, model)

    LazyConfig.save(cfg, str(tmp_path / "config.yaml"))
    again = LazyConfig.load(str(tmp_path / "config.yaml"))
    assert instantiate(again.model.config) == entry.training_config
    assert again.train.max_iter == cfg.train.max_iter
    again.data.train.num_images, again.dataloader.train.total_batch_size = 1000, 100  # an own folder
    assert (again.train.max_iter, again.train.eval_period) == (recipe["epochs"] * 10, 10)


def check_schedule(recipe, cfg):
    epoch, epochs = TRAINING_IMAGES // recipe["batch_size"], recipe["epochs"]
    assert cfg.train.max_iter == epochs * epoch
    assert cfg.train.eval_period == cfg.train.checkpointer.period == epoch
    assert cfg.train.ema.decay == recipe["ema_decay"]
    # the warmup of 5 epochs from 1e-6 to the cosine, which ends at 1e-5
    multiplier, base = instantiate(cfg.lr_multiplier), recipe["lr"]
    rates = {epoch: base * multiplier(epoch / epochs) for epoch in (0, 2.5, epochs / 2, epochs)}
    assert rates == pytest.approx({0: 1e-6, 2.5: (1e-6 + base) / 2, epochs / 2: (1e-5 + base) / 2, epochs: 1e-5})


def check_optimizer(recipe, cfg, model):
    cfg.optimizer.params.model = model
    optimizer = instantiate(cfg.optimizer)
    del cfg.optimizer.params.model
    from_scratch = recipe is FROM_SCRATCH
    assert isinstance(optimizer, Lamb if from_scratch else torch.optim.AdamW)
    rates = {group["lr"] / recipe["lr"] for group in optimizer.param_groups}
    assert sorted(rates) == pytest.approx(sorted({1.0, recipe["interaction_lr_ratio"]}))
    decays = {group["weight_decay"] for group in optimizer.param_groups}
    assert decays == ({0.0, recipe["weight_decay"]} if from_scratch else {recipe["weight_decay"]})
