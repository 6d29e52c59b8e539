"""Recipes beyond the paper: every config builds, and the smallest networks of each kind learn from the digit scenes."""

import dataclasses
import itertools
import shutil
from pathlib import Path

import pytest
import torch

pytest.importorskip("detectron2")

from detectron2.config import LazyConfig, instantiate
from detectron2.utils.events import EventStorage

from piip.lazy import lazy_dataclass
from piip.lazy_config import load_config
from piip_core import PIIP, ConvNeXtConfig, TimmConfig, zoo
from piip_core.meta import on_meta
from piip_digits.data_sets import prepare_digits

FOLDER = Path(__file__).parents[3] / "projects" / "PIIP" / "configs" / "beyond"
CLASSIFIER = zoo.beyond.classifier()


def entry_of(path):
    return CLASSIFIER if path.stem == Path(CLASSIFIER.config_file).stem else zoo.get(path.stem)


def test_there_is_one_config_per_model():
    assert {path.stem for path in FOLDER.glob("*.py")} == {*zoo.beyond.NAMES, Path(CLASSIFIER.config_file).stem}
    assert all((FOLDER.parent / entry.config_file).is_file() for entry in zoo.beyond.entries())


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.py")), ids=lambda path: path.stem)
def test_config(path, tmp_path):
    entry, cfg = entry_of(path), load_config(str(path), ["train.load_pretrained=False"])
    text = path.read_text()
    assert 10 <= len(text.splitlines()) <= 30
    assert (
        text.startswith(f'"""{entry.title} {entry.resolution}: ') and f"weights: {entry.note.split(': ')[1]}.\n" in text
    )
    with on_meta():
        model = instantiate(cfg.model)
    (pyramid,) = (module for module in model.modules() if isinstance(module, PIIP))
    config = getattr(entry.config, "pyramid", entry.config)
    if entry is not CLASSIFIER:  # whose class tokens need no interaction after the last blocks
        assert pyramid.config == config
        assert cfg.train.output_dir == f"output/{path.stem}" and list(cfg.model.pixel_mean) == list(entry.pixel_mean)
    assert [branch.network for branch in pyramid.config.branches] == [branch.network for branch in config.branches]
    cfg.optimizer.params.model = model
    learning = {p for group in instantiate(cfg.optimizer).param_groups for p in group["params"]}
    left_out = {parameter for parameter in model.parameters() if parameter not in learning}
    assert left_out == (set(pyramid.branches.parameters()) if "_frozen_" in path.stem else set())
    del cfg.optimizer.params.model
    LazyConfig.save(cfg, str(tmp_path / "config.yaml"))
    saved = LazyConfig.load(str(tmp_path / "config.yaml")).model
    node = saved.config if entry is CLASSIFIER else saved.backbone.get("bottom_up", saved.backbone).config
    assert instantiate(node) == entry.config


def smallest(config):
    """The same kinds of networks, as small as they can be."""
    branches = []
    for number, branch in enumerate(config.branches):
        options = {"depth": 3, "embed_dim": 32, "num_heads": 2}
        if isinstance(branch.network, ConvNeXtConfig):
            network = ConvNeXtConfig(depths=(1, 1, 2, 1), stage_dims=(8, 16, 24, 32))
        else:
            network = TimmConfig(name=branch.network.name, options=options)
        window = None if branch.window_size is None else 3
        changes = {"network": network, "segments": None, "window_size": window, "pretrained": None}
        branches.append(dataclasses.replace(branch, image_size=(64, 96, 128)[number], **changes))
    interaction = dataclasses.replace(config.interaction, num_interactions=4, num_heads=2)
    merging = config.merging and dataclasses.replace(config.merging, num_groups=8)
    if merging and merging.kind == "regular":
        merging = dataclasses.replace(merging, intermediate_after=(0, 1, 2))
    return dataclasses.replace(config, branches=tuple(branches), interaction=interaction, merging=merging)


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    root = tmp_path_factory.mktemp("digits") / "data"
    prepare_digits(root, num_train=4, num_val=1)
    for name in ("a", "b"):
        shutil.copytree(root / "train", root / "classes" / name)
    return root


def settings(kind, root):
    if kind == "class_folders":
        return [
            f"data.train.images={root}/classes",
            "data.num_classes=2",
            "data.test.images=null",
            "data.image_size=128",
        ]
    if kind == "label_maps":
        return [
            f"data.train.images={root}/train",
            f"data.train.labels={root}/labels/train",
            f"data.classes={root}/labels/names.txt",
            "data.num_classes=11",
            "data.train.scale=[512,128]",
            "data.train.crop=[128,128]",
            "model.train_size=128",
            "model.sem_seg_head.norm=BN",
            "model.sem_seg_head.channels=16",
            "model.auxiliary_head.norm=BN",
        ]
    sizes = ["data.train.crop=128"] if kind == "multi-scale" else ["data.train.scales=[[128,128]]"]
    annotations = root / "annotations" / "instances_train.json"
    return [*sizes, f"data.train.annotations={annotations}", f"data.train.images={root}/train", "data.num_classes=10"]


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        pytest.param("mask_rcnn_piip_dinov3_sbl_1568_1120_672_1x", "coco", marks=pytest.mark.slow),
        ("mask_rcnn_piip_dinov3_sbl_1568_1120_672_frozen_1x", "coco"),
        ("mask_rcnn_piip_dinov3_convnext_t_dinov3_sb_1024_672_448_1x", "coco"),
        pytest.param(
            "cascade_mask_rcnn_piip_dinov3_sbl_1568_1120_672_frozen_3x_ms", "multi-scale", marks=pytest.mark.slow
        ),
        pytest.param("dino_piip_dinov3_sl7b_1536_1024_512_frozen_2x_ms", "multi-scale", marks=pytest.mark.slow),
        ("upernet_piip_dinov3_sbl_1120_448_336_160k", "label_maps"),
        (Path(CLASSIFIER.config_file).stem, "class_folders"),
    ],
)
def test_the_smallest_of_each_kind_trains(name, kind, digits):
    common = ["train.load_pretrained=False", "dataloader.train.total_batch_size=2", "dataloader.train.num_workers=0"]
    cfg = load_config(str(FOLDER / f"{name}.py"), [*common, "train.device=cpu", *settings(kind, digits)])
    if kind == "class_folders":
        pyramid = instantiate(cfg.model.config.pyramid)
        cfg.model.config.pyramid = lazy_dataclass(smallest(pyramid))
    else:
        if "roi_heads" in cfg.model:
            cfg.model.roi_heads.batch_size_per_image = 4
        elif "transformer" in cfg.model:
            cfg.model.transformer.num_queries = 50
        backbone = cfg.model.backbone.get("bottom_up", cfg.model.backbone)
        backbone.config, backbone.pad_divisor = lazy_dataclass(smallest(instantiate(backbone.config))), 64
    torch.manual_seed(0)
    model = instantiate(cfg.model).train()
    before = {key: value.clone() for key, value in model.named_parameters()}
    cfg.optimizer.params.model, cfg.optimizer.lr = model, 1e-3
    optimizer = instantiate(cfg.optimizer)
    for batch in itertools.islice(instantiate(cfg.dataloader.train), 2):
        with EventStorage():
            loss = sum(model(batch).values())
        optimizer.zero_grad()
        loss.backward()
        assert loss.isfinite()
        optimizer.step()
    changed = {key for key, value in model.named_parameters() if not torch.equal(value, before[key])}
    branches = {key for key in before if "pyramid.branches." in key}
    assert not changed & branches if "_frozen_" in name else len(changed & branches) > 0.9 * len(branches)
    assert any(".interactions." in key for key in changed)
