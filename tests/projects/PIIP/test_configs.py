"""Every config loads, builds on the meta device, survives saving, and says what the zoo says."""

from pathlib import Path

import pytest
import torch

pytest.importorskip("detectron2")

from detectron2.config import LazyConfig, instantiate

from piip_core import DensePIIP, zoo

ROOT = Path(__file__).parents[3]
CONFIGS = ROOT / "projects" / "PIIP" / "configs"
COCO = sorted(CONFIGS.glob("COCO/*.py"))


def load(path):
    cfg = LazyConfig.load(str(path))
    cfg.train.load_pretrained = False
    return cfg


def test_there_is_one_config_per_row():
    assert {path.stem for path in COCO} == {f"mask_rcnn_{name}_1x" for name in zoo.names()}


@pytest.mark.parametrize("path", COCO, ids=lambda path: path.stem)
def test_builds_what_the_zoo_says(path):
    row = zoo.get(path.stem.removeprefix("mask_rcnn_").removesuffix("_1x"))
    cfg = load(path)
    assert instantiate(cfg.model.backbone.bottom_up.config) == row.config
    with torch.device("meta"):
        model = instantiate(cfg.model)
        bare = DensePIIP(row.config)
    assert model.backbone.bottom_up.features.state_dict().keys() == bare.state_dict().keys()
    assert model.backbone.padding_constraints["size_divisibility"] == row.pad_divisor
    assert model.backbone.size_divisibility == row.pad_divisor
    assert model.pixel_mean.numel() == 3 and model.input_format == cfg.dataloader.train.mapper.image_format == "RGB"
    scales = [tuple(s) for s in cfg.dataloader.test.mapper.augmentations[0].scales]
    assert scales == [(row.long_side, row.short_side)]


@pytest.mark.parametrize("path", COCO, ids=lambda path: path.stem)
def test_save_and_load(path, tmp_path):
    cfg = load(path)
    LazyConfig.save(cfg, str(tmp_path / "config.yaml"))
    again = LazyConfig.load(str(tmp_path / "config.yaml"))
    config = again.model.backbone.bottom_up.config
    assert instantiate(config) == instantiate(cfg.model.backbone.bottom_up.config)
    assert instantiate(again.lr_multiplier)(0.99) == pytest.approx(0.01)


def test_schedule_is_the_published_one():
    cfg = load(COCO[0])
    iterations = 7330  # 117266 images at 16 per iteration
    assert cfg.train.max_iter == 12 * iterations
    multiplier = instantiate(cfg.lr_multiplier)
    at = {step: multiplier(step / cfg.train.max_iter) for step in (0, 250, 500, 8 * 7330 - 1, 8 * 7330, 11 * 7330)}
    assert at[0] == pytest.approx(0.001) and at[250] == pytest.approx(0.5005, rel=0.01)
    assert [at[k] for k in (500, 8 * 7330 - 1, 8 * 7330, 11 * 7330)] == pytest.approx([1, 1, 0.1, 0.01])


def test_fields_can_be_overridden_on_the_command_line():
    cfg = load(CONFIGS / "COCO" / "mask_rcnn_piip_tsb_1120_896_448_1x.py")
    cfg = LazyConfig.apply_overrides(
        cfg,
        [
            "model.backbone.bottom_up.config.branches.branch1.image_size=224",
            "model.backbone.bottom_up.config.interaction.units=cycle_down",
            "data.num_classes=7",
        ],
    )
    config = instantiate(cfg.model.backbone.bottom_up.config)
    assert config.branches[0].image_size == 224 and config.interaction.units == "cycle_down"
    assert cfg.model.roi_heads.mask_head.num_classes == 7 == cfg.model.roi_heads.box_predictor.num_classes
