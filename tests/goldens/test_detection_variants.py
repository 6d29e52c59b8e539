"""Checkers of detectors and segmentors take every number from the case: cases with other numbers pass."""

import pytest

pytest.importorskip("detectron2")

import torch

from checkers import Status
from written_cases import failed, recorded, run_written


@pytest.fixture
def rpn():
    """Less of the anchors recorded, boxes clipped to another size."""
    info, tensors = recorded("head_fpn_rpn_b")
    for level in range(5):
        anchors = tensors[f"output.anchors.{level}"]
        tensors[f"output.anchors.{level}"] = torch.cat((anchors[:18], anchors[-18:]))
    info["notes"]["decode"] = "12 boxes x 2 classes, clipped to height 90, width 140 or free"
    limit = torch.tensor([140.0, 90.0]).repeat(4)
    for name in ("rpn", "rcnn", "stage3"):
        free = tensors[f"output.decode.{name}_free"]
        tensors[f"output.decode.{name}_clipped"] = free.clamp(min=0).minimum(limit)
    return info, tensors


def test_other_numbers_of_a_proposal_network_pass(rpn, tmp_path):
    result = run_written(tmp_path, *rpn)
    assert result.status is Status.PASSED, str(result)


def test_a_note_with_another_number_fails(rpn, tmp_path):
    info, tensors = rpn
    info["notes"]["decode"] = info["notes"]["decode"].replace("90", "91")
    assert set(failed(run_written(tmp_path, info, tensors))) == {
        f"output.decode.{name}_clipped" for name in ("rpn", "rcnn", "stage3")
    }
    info["notes"]["decode"] = "clipped somehow"
    assert run_written(tmp_path, info, tensors).status is Status.NOT_SUPPORTED


def test_the_share_of_mask_bits_is_that_of_the_case(tmp_path):
    info, tensors = recorded("head_mask_rcnn_b")
    packed = tensors["output.e2e.masks_packed.0"]
    for place in range(0, len(packed), 1500):  # one bit of 12,000
        packed[place] ^= 1
    assert run_written(tmp_path, info, tensors).status is Status.PASSED
    info["notes"]["masks"] = "allow 0.001 percent of bits"
    assert "output.e2e.masks_packed.0" in failed(run_written(tmp_path, info, tensors))


def test_images_of_dino_in_another_order_pass(tmp_path):
    info, tensors = recorded("dino_test_many_queries")
    batch = len(tensors["input.img_shapes"])
    layers = ("inter.all_cls_scores", "inter.all_bbox_preds")
    changed = {}
    for name, x in tensors.items():
        kind, *middle, last = name.split(".")
        if kind == "output":
            name = ".".join([kind, *middle, str(batch - 1 - int(last))])
        elif kind in ("input", "inter") and last != "batch_input_shape":
            x = x.flip(1 if name in layers else 0)
        changed[name] = x
    result = run_written(tmp_path, info, changed)
    assert result.status is Status.PASSED, str(result)


def test_inference_on_the_whole_image_passes(tmp_path):
    info, tensors = recorded("head_upernet_slide_c")
    info["config"]["test_cfg"] = {"mode": "whole"}
    del info["windows_y1y2x1x2"]
    sliding = ("output.slide", "output.count", "output.crop0")
    tensors = {name: x for name, x in tensors.items() if not name.startswith(sliding)}
    tensors["output.pred"] = tensors["output.whole_rescaled"][0].argmax(dim=0).to(torch.uint8)
    result = run_written(tmp_path, info, tensors)
    assert result.status is Status.PASSED, str(result)
    tensors["output.pred"][0, 0] += 1
    assert set(failed(run_written(tmp_path, info, tensors))) == {"output.pred"}


def test_the_formula_of_images_may_be_worded_otherwise(tmp_path):
    info, tensors = recorded("pipe_seg_512")
    info["input_formula"] = "as always"
    info["config"]["pipeline"].insert(0, {"type": "LoadImageFromFile"})
    result = run_written(tmp_path, info, tensors)
    assert result.status is Status.PASSED, str(result)
    info["images"][0]["k"] = 9
    result = run_written(tmp_path, info, tensors)
    assert result.status is Status.NOT_SUPPORTED and "as always" in result.reason
