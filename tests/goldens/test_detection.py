"""Golden cases of heads and pipelines through the project's Detectron2 model."""

import pytest

pytest.importorskip("detectron2")

import torch
from detectron2.modeling.box_regression import Box2BoxTransform
from detectron2.modeling.matcher import Matcher

from checkers import Status
from checkers.detection import rpn
from piip.modeling.rcnn import BestBoxMatcher, PublishedRPN
from piip.modeling.segmentor import SegmentationHead
from written_cases import GOLDENS, failed, recorded, run_path, run_written


@pytest.mark.parametrize(
    ("name", "tensor"),
    [
        ("head_fpn_rpn_b", "output.assigned.0"),
        ("head_fpn_rpn_b", "output.smallpad.loss_rpn_bbox"),
        ("head_fpn_rpn_b", "output.pre_nms_scores.0"),
        ("head_mask_rcnn_b", "output.e2e.labels.0"),
        ("head_mask_rcnn_b", "output.given.masks_packed.0"),
        ("head_mask_rcnn_b", "output.mask_targets_packed"),
        ("head_mask_rcnn_b", "output.acc"),
        ("pipe_det_1333", "output.channel_sum.1"),
        ("pipe_seg_512", "output.pixels_u8.2"),
        ("head_upernet_a", "output.psp"),
        ("head_upernet_b_align", "output.aux.acc_seg"),
        ("head_upernet_slide_c", "output.count"),
        ("head_upernet_slide_c", "output.pred"),
    ],
)
def test_wrong_results_fail_and_are_named(name, tensor, tmp_path):
    info, tensors = recorded(name)
    spoiled = tensors[tensor].view(-1)
    spoiled[: max(1, spoiled.numel() // 100)] += 1
    result = run_written(tmp_path, info, tensors)
    assert result.status is Status.FAILED
    assert failed(result) == [tensor]


def test_detectron2s_own_clamp_differs(monkeypatch):
    monkeypatch.setattr(rpn, "TwoSidedBox2BoxTransform", Box2BoxTransform)
    assert "output.decode.rpn_free" in failed(run_path(GOLDENS / "head_fpn_rpn_b.json"))


def test_detectron2s_own_matcher_differs(monkeypatch):
    def stock(self, quality):
        self.allow_low_quality_matches = self.min_quality is not None
        return Matcher.__call__(self, quality)

    monkeypatch.setattr(BestBoxMatcher, "__call__", stock)
    assert "output.assigned.0" in failed(run_path(GOLDENS / "head_fpn_rpn_b.json"))


def test_dividing_by_valid_pixels_differs(monkeypatch):
    losses = SegmentationHead.losses

    def over_valid_pixels(self, logits, targets, **kwargs):
        self.loss_average = "valid"
        return losses(self, logits, targets, **kwargs)

    monkeypatch.setattr(SegmentationHead, "losses", over_valid_pixels)
    assert set(failed(run_path(GOLDENS / "head_upernet_a.json"))) == {"output.decode.loss_ce", "output.aux.loss_ce"}


def test_padding_cells_matter(monkeypatch):
    everything = PublishedRPN.considered_anchors

    def with_padding(self, anchors, image_size, padded_size):
        return everything(self, anchors, image_size, (float("inf"), float("inf")))

    monkeypatch.setattr(PublishedRPN, "considered_anchors", with_padding)
    assert "output.smallpad.loss_rpn_cls" in failed(run_path(GOLDENS / "head_fpn_rpn_b.json"))


@pytest.mark.parametrize(
    ("name", "path", "value"),
    [
        ("head_mask_rcnn_b", ("neck", "type"), "BiFPN"),
        ("head_mask_rcnn_b", ("test_cfg", "rcnn", "mask_thr_binary"), 0.4),
        ("head_mask_rcnn_b", ("roi_head", "bbox_head", "type"), "Shared4Conv1FCBBoxHead"),
        ("head_upernet_a", ("decode_head", "loss_decode", "use_sigmoid"), True),
        ("head_upernet_a", ("auxiliary_head", "type"), "PSPHead"),
        ("head_upernet_slide_c", ("backbone", "type"), "ResNet"),
        ("pipe_seg_512", ("pipeline", 0, "transforms", 0, "setr_multi_scale"), False),
        ("pipe_det_1333", ("pipeline",), [{"type": "MultiScaleFlipAug", "flip": True, "transforms": []}]),
    ],
)
def test_settings_that_the_model_lacks_are_not_supported_yet(name, path, value, tmp_path):
    info, tensors = recorded(name)
    node = info["config"]
    for key in path[:-1]:
        node = node[key]
    node[path[-1]] = value
    assert run_written(tmp_path, info, tensors).status is Status.NOT_SUPPORTED


def test_other_detectors_are_not_supported_yet(tmp_path):
    info, _ = recorded("head_fpn_rpn_b")
    info["config"]["type"] = "SomeDETR"
    result = run_written(tmp_path, info, {"output.e2e.boxes.0": torch.zeros(1, 4)})
    assert result.status is Status.NOT_SUPPORTED and "SomeDETR" in result.reason
