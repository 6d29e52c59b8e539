"""Every config loads, builds on the meta device, survives saving, and trains as published."""

import ast
import csv
import gzip
import json
import math
from pathlib import Path

import pytest

pytest.importorskip("detectron2")

from detectron2.config import LazyConfig, instantiate
from detectron2.data import transforms as T

from piip.data import KeepRatioResize, MultiScaleCrop, PhotometricDistortion
from piip.lazy import lazy_dataclass
from piip_core import DensePIIP, zoo
from piip_core.branches import ConvNeXtConfig
from piip_core.checkpoints import published_names
from piip_core.checkpoints.head_names import HEADS
from piip_core.meta import on_meta

ROOT = Path(__file__).parents[3]
CONFIGS = ROOT / "projects" / "PIIP" / "configs"
SETTINGS = json.loads((ROOT / "tests" / "data" / "zoo_settings.json").read_text())
TABLES = ROOT / "tests" / "data" / "param_groups"
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
ENTRIES = {entry.config_file: entry for entry in zoo.entries()}
RECORDED_GROUPS = {path.name.removesuffix(".tsv.gz") for path in TABLES.iterdir()}
# Recorded of the network as the public code builds it, which is another one
AS_RELEASED = {"piip_tsbl_1568_1120_672_448"}

# Models that the paper alone has: the released one whose training they share, and what the paper changes
_LARGE = {"crop": 1280, "scale": [1666, 1000]}
_LONG = {"epochs": 36, "lr_drops": [27, 33], "crop": 1568, "scale": [2041, 1225]}
_WIDE = {"crop": 896, "scale": [3584, 896], "stride": 597}
_CROP_640 = {"crop": 640, "scale": [2560, 640], "stride": 426, "max_iter": 160_000}
_WIDER = {"crop": 1120, "scale": [4480, 1120], "stride": 746}
PAPER_ONLY = {
    "piip_lh6b_1280_1024_256": ("piip_h6b_1024_512", _LARGE),
    "piip_lh6b_1280_1024_512": ("piip_h6b_1024_512", _LARGE),
    "piip_lh6b_1280_1024_640": ("piip_h6b_1024_512", _LARGE),
    "piip_tsb_1568_1120_672_cascade_1x": ("piip_tsb_1568_1120_672", {}),
    "piip_sbl_1568_1120_672_cascade_1x": ("piip_sbl_1568_1120_672", {}),
    "piip_tsb_1568_1120_672_cascade_3x_ms": ("piip_tsb_1568_1120_672", _LONG),
    "piip_sbl_1568_1120_672_cascade_3x_ms": ("piip_sbl_1568_1120_672", _LONG),
    "vit_b_640_upernet": ("piip_h6b_512_512_upernet", _CROP_640),
    "vit_l_640_upernet": ("piip_h6b_512_512_upernet", _CROP_640),
    "internvit_6b_windows_512_upernet": ("piip_h6b_512_512_upernet", {"max_iter": 160_000}),
    "piip_lh6b_640_512_192_upernet": ("piip_h6b_512_512_upernet", _CROP_640),
    "piip_lh6b_640_512_256_upernet": ("piip_h6b_512_512_upernet", _CROP_640),
    "piip_lh6b_640_512_384_upernet": ("piip_h6b_512_512_upernet", _CROP_640),
    "piip_tsb_896_448_336_upernet": ("piip_h6b_512_512_upernet", _WIDE | {"max_iter": 160_000}),
    "piip_sbl_1120_448_336_upernet": ("piip_h6b_512_512_upernet", _WIDER | {"max_iter": 160_000}),
}


def published_recipe(name):
    """How a model was trained, by the public settings."""
    like, changes = PAPER_ONLY.get(name, (name, {}))
    optimizer, schedule, image = (SETTINGS[like][key] for key in ("optimizer", "schedule", "image"))
    return {
        "lr": optimizer["lr"],
        "weight_decay": optimizer["weight_decay"],
        "layer_decay": optimizer["layer_decay"] and optimizer["layer_decay"]["layer_decay_rate"],
        "batch_size": 32 if "bs32" in SETTINGS[like]["config_file"] else 16,
        "warmup_iters": schedule["lr"]["warmup_iters"],
        "warmup_factor": schedule["lr"]["warmup_ratio"],
        "epochs": schedule.get("max_epochs"),
        "lr_drops": schedule["lr"].get("step"),
        "max_iter": schedule.get("max_iters"),
        "scale": image["scale"],
        "crop": image.get("crop"),
        "stride": image.get("stride", [None])[0],
        **changes,
    }


def attention_of(branches):
    """As the docstrings of the configs say it."""
    kinds = {}
    for number, branch in enumerate(branches, 1):
        first, *_, last = branch.window_sizes
        kind = "global attention" if first is None else f"windows of {first}"
        if not isinstance(branch.network, ConvNeXtConfig):
            kinds.setdefault(kind + (", every third block global" if first and not last else ""), []).append(number)
    if len(kinds) < 2:
        return "".join(kinds)
    (windows,) = kinds.keys() - {"global attention"}
    numbers = kinds[windows]
    return f"{windows} in Branch{'es' if len(numbers) > 1 else ''} {' and '.join(map(str, numbers))}"


def check_params(name, features):
    counted = sum(tensor.numel() for tensor in features.state_dict().values()) / 1e6
    assert RECORDED_PARAMS[name] - counted == pytest.approx(DEAD_PARAMS / 2, abs=0.003)


def test_there_is_one_config_per_model():
    assert {path.relative_to(CONFIGS).as_posix() for path in PATHS} == set(ENTRIES)


@pytest.mark.parametrize("entry", [*zoo.entries(), *zoo.classification_entries()], ids=lambda entry: entry.name)
def test_docstrings_tell_images_and_windows(entry):
    config = getattr(entry.config, "pyramid", entry.config)
    title, _, rest = ast.get_docstring(ast.parse((CONFIGS / entry.config_file).read_text())).partition(": ")
    title, _, attention = title.partition(f" {entry.resolution}")
    assert entry.title.startswith(title) and attention.removeprefix(", ") == attention_of(config.branches)
    assert rest.endswith(("COCO.", "ADE20K.", "ImageNet-1K."))


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_config(path, tmp_path):
    """Loads, builds on the meta device, trains as published, has parameter groups, and survives saving."""
    entry, cfg = ENTRIES[path.relative_to(CONFIGS).as_posix()], load(path)
    recipe = published_recipe(entry.name)
    with on_meta():
        model = instantiate(cfg.model)
    features = getattr(model.backbone, "bottom_up", model.backbone).features
    assert type(features) is DensePIIP and features.pyramid.config == entry.config
    if entry.name in RECORDED_PARAMS and entry.name not in AS_RELEASED:
        check_params(entry.name, features)
    assert model.backbone.size_divisibility == entry.pad_divisor
    assert model.pixel_mean.flatten().shape == (3,) and list(cfg.model.pixel_mean) == list(entry.pixel_mean)
    assert list(cfg.model.pixel_std) == list(entry.pixel_std)
    assert model.input_format == cfg.dataloader.train.mapper.image_format == "RGB"
    assert cfg.dataloader.train.total_batch_size == recipe["batch_size"]
    assert cfg.train.output_dir == f"output/{path.stem}"
    if entry.head == "upernet":
        check_segmentation(recipe, cfg)
    else:
        check_data(recipe, cfg)
        check_schedule(recipe, cfg)
        assert cfg.dataloader.train.mapper.use_instance_mask == (entry.head != "dino")
    check_heads(entry, model)
    check_optimizer(entry.name, recipe, cfg, model)

    LazyConfig.save(cfg, str(tmp_path / "config.yaml"))
    again = LazyConfig.load(str(tmp_path / "config.yaml"))
    assert instantiate(again.model.backbone.get("bottom_up", again.model.backbone).config) == entry.config
    assert instantiate(again.lr_multiplier)(0.99) == pytest.approx(0.01)


def check_heads(entry, model):
    """The model's names are those that published checkpoints are converted to."""
    ours = {name for name in model.state_dict() if not name.startswith(HEADS[entry.head].backbone)}
    assert ours == set(HEADS[entry.head].published)


def check_data(recipe, cfg):
    (test,) = instantiate(cfg.dataloader.test.mapper.augmentations)
    assert test.scales == [tuple(recipe["scale"])]
    augmentations = instantiate(cfg.dataloader.train.mapper.augmentations)
    assert sorted(type(a).__name__ for a in augmentations if not isinstance(a, KeepRatioResize | MultiScaleCrop)) == [
        "RandomFlip"
    ]
    if recipe["crop"] is None:
        assert [a.scales for a in augmentations if isinstance(a, KeepRatioResize)] == [test.scales]
    else:
        assert [a.crop for a in augmentations if isinstance(a, MultiScaleCrop)] == [recipe["crop"]]


def check_segmentation(recipe, cfg):
    side, length, warmup = recipe["crop"], recipe["max_iter"], recipe["warmup_iters"]
    resize, crop, flip, distortion = instantiate(cfg.dataloader.train.mapper.augmentations)
    assert isinstance(resize, KeepRatioResize) and isinstance(flip, T.RandomFlip)
    assert (list(resize.scales[0]), tuple(resize.ratio_range)) == (recipe["scale"], (0.5, 2.0))
    assert tuple(crop.crop_aug.crop_size) == (side, side) and crop.single_category_max_area == 0.75
    assert isinstance(distortion, PhotometricDistortion)
    (test,) = instantiate(cfg.dataloader.test.mapper.augmentations)
    assert isinstance(test, KeepRatioResize) and test.scales == [(math.inf, side)]
    assert (cfg.model.inference, cfg.model.window, cfg.model.stride) == ("slide", side, recipe["stride"])
    assert cfg.model.train_size == side
    assert cfg.model.sem_seg_head.num_classes == cfg.model.auxiliary_head.num_classes == 150
    assert cfg.train.max_iter == length
    multiplier = instantiate(cfg.lr_multiplier)
    expected = {0: recipe["warmup_factor"], warmup: 1 - warmup / length, length // 2: 0.5}
    assert {step: multiplier(step / length) for step in expected} == pytest.approx(expected)


def check_schedule(recipe, cfg):
    epoch = math.ceil(117266 / recipe["batch_size"])
    assert cfg.train.max_iter == recipe["epochs"] * epoch
    assert cfg.train.eval_period == cfg.train.checkpointer.period == epoch
    multiplier = instantiate(cfg.lr_multiplier)
    edges = [0, recipe["warmup_iters"], *(drop * epoch for drop in recipe["lr_drops"]), cfg.train.max_iter - 1]
    steps = sorted({min(max(edge + k, 0), edges[-1]) for edge in edges for k in (-1, 0, 1, 250)})
    expected = [published_factor(step, epoch, recipe) for step in steps]
    assert [multiplier(step / cfg.train.max_iter) for step in steps] == pytest.approx(expected, rel=1e-6)


def published_factor(iteration, epoch, recipe):
    """Step schedule with linear warmup, by the published rule."""
    factor = 0.1 ** sum(iteration >= drop * epoch for drop in recipe["lr_drops"])
    if iteration < recipe["warmup_iters"]:
        factor *= 1 - (1 - iteration / recipe["warmup_iters"]) * (1 - recipe["warmup_factor"])
    return factor


def build_optimizer(cfg, model):
    cfg.optimizer.params.model = model
    optimizer = instantiate(cfg.optimizer)
    del cfg.optimizer.params.model
    return optimizer


def check_optimizer(name, recipe, cfg, model):
    optimizer = build_optimizer(cfg, model)
    grouped = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    assert len(grouped) == len(set(grouped)) == len(list(model.parameters()))
    assert max(group["lr"] for group in optimizer.param_groups) == recipe["lr"]
    decays = {group["weight_decay"] for group in optimizer.param_groups}
    if recipe["layer_decay"] is None:  # plain AdamW: norms and biases decay, too
        assert decays == {recipe["weight_decay"]} and len({group["lr"] for group in optimizer.param_groups}) == 1
    else:
        assert decays == {0.0, recipe["weight_decay"]}
        assert cfg.optimizer.params.decay_rate == recipe["layer_decay"]
    if name in RECORDED_GROUPS and name not in AS_RELEASED:
        check_groups(name, cfg, model, optimizer)


def check_groups(name, cfg, model, optimizer):
    """Learning-rate scale and weight decay of every parameter are the published ones."""
    with gzip.open(TABLES / f"{name}.tsv.gz", "rt") as file:
        rows = csv.DictReader(file, delimiter="\t")
        expected = {r["param"]: (float(r["lr_scale"]), float(r["weight_decay"])) for r in rows}
    backbone = cfg.model.backbone.get("bottom_up", cfg.model.backbone)
    names = published_names(instantiate(backbone.config), list(expected))
    expected = {name: value for name, value in expected.items() if name not in names.unused_tensors()}
    names = names.table()
    ours = {parameter: [key for key, _ in names.to_published(name)] for name, parameter in model.named_parameters()}
    actual = {
        name: (group["lr"] / cfg.optimizer.lr, group["weight_decay"])
        for group in optimizer.param_groups
        for p in group["params"]
        for name in ours[p]
    }
    assert expected.keys() <= actual.keys()
    for name, (scale, decay) in expected.items():
        assert actual[name] == (pytest.approx(scale, rel=1e-6), decay), name


def test_what_is_recorded_is_of_the_zoo():
    assert len(RECORDED_GROUPS) == 11
    assert RECORDED_GROUPS | RECORDED_PARAMS.keys() <= {entry.name for entry in ENTRIES.values()}


@pytest.mark.parametrize("name", AS_RELEASED)
def test_four_branches_as_the_public_code_builds_them(name):
    entry = zoo.get(name)
    cfg = load(CONFIGS / entry.config_file)
    cfg.model.backbone.bottom_up.config = lazy_dataclass(zoo.tsbl_as_released(entry.config))
    with on_meta():
        model = instantiate(cfg.model)
    check_params(name, model.backbone.bottom_up.features)
    check_groups(name, cfg, model, build_optimizer(cfg, model))


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
