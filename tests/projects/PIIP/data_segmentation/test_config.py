"""configs/common/ade20k.py, the schedule of the segmentors, and own data in one step."""

from __future__ import annotations

import pytest

pytest.importorskip("detectron2")

import torch
from detectron2.config import instantiate

from piip.data import DatasetError, KeepRatioResize, PhotometricDistortion
from piip.lazy_config import follow_annotations, has_test_set, load_config
from piip.predict import find_categories
from piip.solver import WarmupFactor
from piip_core import zoo


@pytest.fixture
def load(repo_root):
    def load(name, *overrides):
        return load_config(str(repo_root / f"projects/PIIP/configs/common/{name}.py"), overrides)

    return load


def test_ade20k_is_as_published(load):
    cfg = load("ade20k")
    assert [c.id for c in follow_annotations(cfg, training=True)] == list(range(1, 151))
    assert cfg.data.num_classes == 150 and cfg.dataloader.train.total_batch_size == 16
    resize, crop, flip, colours = instantiate(cfg.dataloader.train.mapper.augmentations)
    assert isinstance(resize, KeepRatioResize)
    assert resize.scales == [(2048, 512)] and tuple(resize.ratio_range) == (0.5, 2.0)
    assert (crop.single_category_max_area, crop.ignored_category) == (0.75, 255)
    assert tuple(crop.crop_aug.crop_size) == (512, 512) and flip.prob == 0.5 and flip.horizontal
    assert isinstance(colours, PhotometricDistortion)
    assert instantiate(cfg.dataloader.test.mapper).classes.reduce_zero_label


def test_own_data_needs_folders_and_names(load, shared_files):
    cfg = load("ade20k", *shared_files.overrides("train", "test"), "+model.num_classes=${data.num_classes}")
    categories = follow_annotations(cfg, training=False)
    assert [(c.id, c.name) for c in categories] == [(0, "ground"), (1, "disc"), (2, "bar")]
    assert cfg.model.num_classes == 3
    assert len(instantiate(cfg.dataloader.train.dataset)) == len(instantiate(cfg.dataloader.test.dataset)) == 6
    for names in ("data.classes=[a,b,c]", "data.classes=3"):
        cfg = load("ade20k", *shared_files.overrides("train"), names)
        assert len(follow_annotations(cfg, training=True)) == cfg.data.num_classes == 3
        assert len(instantiate(cfg.dataloader.train.dataset)) == 6
    with pytest.raises(DatasetError, match=r"data.classes=nowhere.txt: no such file"):
        follow_annotations(load("ade20k", "data.classes=nowhere.txt"), training=True)


def test_a_checkpoint_without_classes_takes_those_of_the_configuration(load, shared_files, tmp_path):
    torch.save({"model": {}}, tmp_path / "converted.pth")
    checkpoint = str(tmp_path / "converted.pth")
    assert find_categories(load("ade20k"), checkpoint)[149].name == "flag"
    own = find_categories(load("ade20k", *shared_files.overrides("test")), checkpoint)
    assert [c.name for c in own] == ["ground", "disc", "bar"]
    assert find_categories(load("ade20k"), checkpoint, ["mine"])[0].name == "mine"


def test_no_test_set(load):
    assert has_test_set(load("ade20k")) and has_test_set(load("coco"))
    assert not has_test_set(load("ade20k", "data.test.labels=null"))
    assert not has_test_set(load("coco", "data.test.annotations=null"))


@pytest.mark.parametrize("max_iter", [80_000, 160_000])
def test_the_schedule_is_the_published_one(repo_root, max_iter):
    path = repo_root / "projects/PIIP/configs" / zoo.get("piip_h6b_512_192_upernet").config_file
    cfg = load_config(str(path), [f"train.max_iter={max_iter}"])
    multiplier = instantiate(cfg.lr_multiplier)
    for iteration in (0, 1, 750, 1499, 1500, 1501, 40_000, max_iter - 1):
        rate = 4e-5 * (1 - iteration / max_iter)
        if iteration < 1500:  # the rate is lowered by what the warmup lacks
            rate *= 1 - (1 - iteration / 1500) * (1 - 1e-6)
        assert cfg.optimizer.lr * multiplier(iteration / max_iter) == pytest.approx(rate, rel=1e-9)
    assert multiplier(1.0) == 0.0
    assert (cfg.optimizer.weight_decay, cfg.optimizer.params.decay_rate) == (0.05, 0.95)


def test_a_warmup_longer_than_the_training_is_refused():
    with pytest.raises(ValueError, match=r"warmup_iters=10: expected 0 to max_iter=5"):
        WarmupFactor(lambda where: 1.0, 10, 1e-6, 5)
