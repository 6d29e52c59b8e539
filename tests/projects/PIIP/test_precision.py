"""Precision of training and evaluation, against PyTorch's own autocast and the dtypes that modules see."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("detectron2")

import torch
from detectron2.config import instantiate

from piip.lazy_config import load_config
from piip.precision import set_precision
from piip_core.errors import ConfigError


@pytest.fixture
def build():
    """A tiny PIIP Mask R-CNN with settings of `train`, always of the same weights, and what its parts get and give."""

    def build(*opts: str, train: bool = False):
        cfg = load_config(
            str(Path(__file__).with_name("tiny_piip_mask_rcnn.py")),
            ["model.roi_heads.box_predictor.test_score_thresh=0.0", *opts],
        )
        torch.manual_seed(0)
        model = instantiate(cfg.model).train(train)
        set_precision(model, cfg)
        seen = {}
        features, neck = model.backbone.bottom_up.features, model.backbone.fpn_output2
        features.register_forward_hook(lambda _m, _x, maps: seen.update(backbone=maps[0].dtype))
        neck.register_forward_hook(lambda _m, x, y: seen.update(neck=y.dtype))
        return model, seen

    return build


@pytest.fixture
def images():
    return [{"image": torch.randint(0, 256, (3, 64, 96), generator=torch.Generator().manual_seed(1)).byte()}]


def _assert_same(found, wanted):
    for name in ("pred_boxes", "scores", "pred_masks"):
        left, right = (getattr(getattr(x, name), "tensor", getattr(x, name)) for x in (found, wanted))
        assert torch.equal(left, right), name


@torch.no_grad()
def test_evaluation_runs_under_the_autocast_that_is_asked_for(build, images):
    plain, seen = build()
    exact = plain(images)[0]["instances"]
    assert set(seen.values()) == {torch.float32}
    with torch.autocast("cpu", torch.bfloat16):
        wanted = plain(images)[0]["instances"]
    assert len(exact) > 0
    assert not torch.equal(wanted.scores.float(), exact.scores)
    for opts in (["train.eval_precision=bfloat16"], ["train.eval_precision=training", "train.amp.enabled=True"]):
        model, seen = build(*opts)
        _assert_same(model(images)[0]["instances"], wanted)
        assert set(seen.values()) == {torch.bfloat16}
    training_only, _ = build("train.amp.enabled=True")
    _assert_same(training_only(images)[0]["instances"], exact)


@torch.no_grad()
def test_heads_in_float32_leave_autocast_to_the_backbone(build, images):
    model, seen = build("train.eval_precision=bfloat16", "train.amp.float32_heads=True")
    found = model(images)[0]["instances"]
    assert seen == {"backbone": torch.bfloat16, "neck": torch.float32}
    plain, _ = build()
    backbone = plain.backbone.bottom_up
    forward = backbone.forward

    def half(x):
        with torch.autocast("cpu", torch.bfloat16):
            return {name: map.float() for name, map in forward(x).items()}

    backbone.forward = half
    _assert_same(found, plain(images)[0]["instances"])
    with torch.autocast("cpu", torch.bfloat16):  # as a trainer that scales losses has it around the model
        _assert_same(model(images)[0]["instances"], found)


def test_training_keeps_heads_in_float32_too(build):
    model, seen = build("train.amp.enabled=True", "train.amp.float32_heads=True", train=True)
    maps = model.backbone(torch.rand(1, 3, 64, 96))
    assert maps["p2"].dtype == torch.float32
    assert seen == {"backbone": torch.bfloat16, "neck": torch.float32}
    maps["p2"].sum().backward()
    assert all(p.grad.isfinite().all() for p in model.backbone.parameters() if p.grad is not None)


def test_what_is_no_precision_is_refused(build):
    with pytest.raises(ConfigError, match=r"train.eval_precision='half': expected 'training' or one of float32, bf"):
        build("train.eval_precision=half")
    cfg = load_config(str(Path(__file__).with_name("tiny_mask_rcnn.py")), ["train.amp.float32_heads=True"])
    cfg.train.amp.enabled = True
    with pytest.raises(ConfigError, match=r"train.amp.float32_heads=True: expected false for GeneralizedRCNN, which"):
        set_precision(instantiate(cfg.model), cfg)
