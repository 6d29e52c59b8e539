"""Every config loads, builds on the meta device, survives saving, and says what the zoo says."""

import math
from pathlib import Path

import pytest

pytest.importorskip("detectron2")

from detectron2.config import LazyConfig, instantiate
from detectron2.data import transforms as T
from omegaconf import OmegaConf

from piip.data import KeepRatioResize, MultiScaleCrop, ShortSideResize
from piip.data.segmentation import PhotometricDistortion, RatioRangeResize
from piip_core import zoo
from piip_core.checkpoints import model_shapes
from piip_core.checkpoints.head_names import HEADS
from piip_core.meta import on_meta

ROOT = Path(__file__).parents[3]
CONFIGS = ROOT / "projects" / "PIIP" / "configs"
PATHS = sorted(path for folder in ("COCO", "ADE20K") for path in CONFIGS.glob(f"{folder}/*.py"))


def load(path):
    cfg = LazyConfig.load(str(path))
    cfg.train.load_pretrained = False
    return cfg


# Millions of parameters of the backbones as the public code builds them
RECORDED_PARAMS = {
    "vit_b_1024": 92.896,
    "piip_tsb_1568_1120_672": 175.044,
    "vit_l_1024": 315.935,
    "piip_sbl_1568_1120_672": 547.81,
    "piip_tsbl_1568_1120_672_448": 593.216,  # Branch 4 a copy of Branch 3's model
    "internvit_6b_1024": 6026.07,
    "piip_h6b_1024_512": 7293.644,
    "piip_h6b_speedup_1024_512": 7172.846,
    "piip_lh6b_1536_1024_512": 7481.135,
    "piip_sbl_augreg384_1568_1120_672": 548.639,
    "piip_sbl_augreg384_speedup_1568_1120_672": 521.162,
    "piip_sbl_uniperceiver_1568_1120_672": 547.828,
    "piip_sbl_mae_1568_1120_672": 547.812,
    "piip_sbl_dinov2_1568_1120_672": 549.614,
    "piip_sbl_beitv2_1568_1120_672": 549.022,
    "convnext_b_1024": 87.566,
    "piip_ct_cs_cb_1024_672_448": 210.924,
    "piip_ct_vs_vb_1024_672_448": 190.05,
    "piip_ct_cs_vb_1024_672_448": 218.022,
    "piip_ct_vs_cb_1024_672_448": 178.762,
    "piip_vt_cs_vb_1024_672_448": 193.238,
    "piip_vt_cs_cb_1024_672_448": 178.014,
    "piip_vt_vs_cb_1024_672_448": 146.349,
    "piip_h6b_1024_768_dino": 7211.711,
}
# What the public classes have besides and never use: position entries of class tokens, ConvNeXt's last norms
DEAD_PARAMS = 0.005
ROWS = {entry.config_file: entry for entry in zoo.entries()}


def backbone_params(config):
    return sum(math.prod(shape) for shape in model_shapes(config).values()) / 1e6


def test_there_is_one_config_per_row():
    assert {path.relative_to(CONFIGS).as_posix() for path in PATHS} == set(ROWS)


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_config(path, tmp_path):
    """Loads, builds on the meta device, says what the zoo says, has parameter groups, and survives saving."""
    row, cfg = ROWS[path.relative_to(CONFIGS).as_posix()], load(path)
    with on_meta():
        model = instantiate(cfg.model)
    features = getattr(model.backbone, "bottom_up", model.backbone).features
    assert features.pyramid.config == row.config
    assert {name: tensor.shape for name, tensor in features.state_dict().items()} == dict(model_shapes(row.config))
    assert model.backbone.size_divisibility == row.pad_divisor
    assert model.pixel_mean.flatten().shape == (3,) and list(cfg.model.pixel_mean) == list(row.pixel_mean)
    assert model.input_format == cfg.dataloader.train.mapper.image_format == "RGB"
    assert cfg.dataloader.train.total_batch_size == row.batch_size
    if isinstance(row, zoo.SegmentationEntry):
        check_segmentation(row, cfg)
    else:
        check_data(row, cfg)
        check_schedule(row, cfg)
    check_heads(row, model)
    check_optimizer(row, cfg, model)

    LazyConfig.save(cfg, str(tmp_path / "config.yaml"))
    again = LazyConfig.load(str(tmp_path / "config.yaml"))
    assert instantiate(again.model.backbone.get("bottom_up", again.model.backbone).config) == row.config
    assert OmegaConf.to_yaml(again) == OmegaConf.to_yaml(LazyConfig.load(str(tmp_path / "config.yaml")))
    assert instantiate(again.lr_multiplier)(0.99) == pytest.approx(0.01)


def check_heads(row, model):
    """The model's names are those that published checkpoints are converted to."""
    ours = {name for name in model.state_dict() if not name.startswith(HEADS[row.head].backbone)}
    assert ours == set(HEADS[row.head].tensors())


def check_data(row, cfg):
    (test,) = instantiate(cfg.dataloader.test.mapper.augmentations)
    assert test.scales == [(row.long_side, row.short_side)]
    augmentations = instantiate(cfg.dataloader.train.mapper.augmentations)
    assert sorted(type(a).__name__ for a in augmentations if not isinstance(a, KeepRatioResize | MultiScaleCrop)) == [
        "RandomFlip"
    ]
    if row.training_crop is None:
        assert [a.scales for a in augmentations if isinstance(a, KeepRatioResize)] == [test.scales]
    else:
        assert [a.crop for a in augmentations if isinstance(a, MultiScaleCrop)] == [row.training_crop]


def check_segmentation(row, cfg):
    side = row.crop_size
    resize, crop, flip, distortion = instantiate(cfg.dataloader.train.mapper.augmentations)
    assert isinstance(resize, RatioRangeResize) and isinstance(flip, T.RandomFlip)
    assert (tuple(resize.scale), tuple(resize.ratio_range)) == ((4 * side, side), (0.5, 2.0))
    assert tuple(crop.crop_aug.crop_size) == (side, side) and crop.single_category_max_area == 0.75
    assert isinstance(distortion, PhotometricDistortion)
    (test,) = instantiate(cfg.dataloader.test.mapper.augmentations)
    assert isinstance(test, ShortSideResize) and test.short_side == side
    assert (cfg.model.inference, cfg.model.window, cfg.model.stride) == ("slide", side, row.stride)
    assert cfg.model.sem_seg_head.num_classes == cfg.model.auxiliary_head.num_classes == 150
    assert cfg.train.max_iter == row.iterations
    multiplier = instantiate(cfg.lr_multiplier)
    expected = {0: 1e-6, row.warmup_iters: 1 - row.warmup_iters / row.iterations, row.iterations // 2: 0.5}
    assert {step: multiplier(step / row.iterations) for step in expected} == pytest.approx(expected)


def check_schedule(row, cfg):
    epoch = math.ceil(117266 / row.batch_size)
    assert cfg.train.max_iter == row.epochs * epoch and cfg.train.eval_period == epoch
    multiplier = instantiate(cfg.lr_multiplier)
    steps = [0, 500, *(drop * epoch + offset for drop in row.lr_drops for offset in (-1, 0))]
    assert [multiplier(step / cfg.train.max_iter) for step in steps] == pytest.approx([0.001, 1, 1, 0.1, 0.1, 0.01])


def check_optimizer(row, cfg, model):
    """Equality with the published groups, where they are recorded, is in test_solver.py."""
    cfg.optimizer.params.model = model
    optimizer = instantiate(cfg.optimizer)
    del cfg.optimizer.params.model
    grouped = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    assert len(grouped) == len(set(grouped)) == len(list(model.parameters()))
    assert max(group["lr"] for group in optimizer.param_groups) == row.learning_rate
    decays = {group["weight_decay"] for group in optimizer.param_groups}
    assert decays == ({row.weight_decay} if row.layer_decay is None else {0.0, row.weight_decay})


@pytest.mark.parametrize("name", RECORDED_PARAMS)
def test_parameter_counts_are_the_recorded_ones(name):
    config = zoo.get(name).config
    config = zoo.tsbl_as_released(config) if len(config.branches) == 4 else config
    assert RECORDED_PARAMS[name] - backbone_params(config) == pytest.approx(DEAD_PARAMS / 2, abs=0.003)


def test_schedule_is_the_published_one():
    cfg = load(CONFIGS / "COCO" / "mask_rcnn_vit_b_1024_1x.py")
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
