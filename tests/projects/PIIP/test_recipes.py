"""Trainings that no config has: other schedules, and overrides on the command line."""

from pathlib import Path

import pytest
import torch

pytest.importorskip("detectron2")

from detectron2.config import instantiate

from piip.lazy_config import load_config
from piip.recipes import detector, segmentor
from piip_core import ConfigError, zoo

COMMON = Path(__file__).parents[3] / "projects" / "PIIP" / "configs" / "common"
GIVEN = {"scale": (1024, 614), "batch_size": 16, "lr": 3e-4, "layer_decay": 0.95, "epochs": 12, "lr_drops": (8, 11)}


def train(**changes):
    return detector(zoo.get("vit_b_1024"), **GIVEN | changes)


def test_every_call_returns_nodes_of_its_own():
    first, second = train(epochs=5, lr_drops=(4,), batch_size=100), train()
    assert first[5].max_iter == 5 * 1173 and second[5].max_iter == 12 * 7330  # of 117266 images
    multiplier = instantiate(first[4])
    assert [multiplier(step / 5865) for step in (0, 500, 4691, 4692)] == pytest.approx([0.001, 1, 1, 0.1])
    assert not {id(node) for node in first} & {id(node) for node in second}


@pytest.mark.parametrize("decay", [None, 0.5])
def test_without_layer_decay_everything_decays(decay):
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 1), torch.nn.BatchNorm2d(4), torch.nn.LayerNorm(4))
    _, _, _, node, _, _ = train(layer_decay=decay)
    node.params.model = model
    optimizer = instantiate(node)
    decays = {p: group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert {group["lr"] for group in optimizer.param_groups} == {3e-4}
    expected = {p: 0.05 if decay is None or p.ndim > 1 else 0.0 for p in model.parameters()}
    assert decays == expected


def test_heads_of_the_other_kind_are_refused():
    with pytest.raises(ConfigError, match=r"piip_h6b_512_192_upernet: head='upernet'.*'mask_rcnn'"):
        detector(zoo.get("piip_h6b_512_192_upernet"), **GIVEN)
    with pytest.raises(ConfigError, match=r"vit_b_1024: head='mask_rcnn'.*'upernet'"):
        segmentor(zoo.get("vit_b_1024"), crop=512, batch_size=16, lr=4e-5, layer_decay=0.95, max_iter=80_000)


def test_crop_and_test_scale_can_be_overridden_on_the_command_line():
    overrides = ["data.train.crop=512", "data.test.scales=[[666,400]]"]
    cfg = load_config(str(COMMON / "coco_ms.py"), overrides)
    _, crop = instantiate(cfg.dataloader.train.mapper.augmentations)
    assert crop.crop == 512
    (test,) = instantiate(cfg.dataloader.test.mapper.augmentations)
    assert test.scales == [(666, 400)]
    with pytest.raises(ConfigError, match=r"data\.train\.scales"):
        load_config(str(COMMON / "coco_ms.py"), ["data.train.scales=[[64,48]]"])
