"""Detectron2's tracing of a detector: its analysis, and whole detectors as files."""

from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("detectron2")

import onnx
import onnxruntime
from detectron2.config import LazyConfig, instantiate
from detectron2.utils.analysis import FlopCountAnalysis, activation_count_operators, parameter_count_table
from PIL import Image
from safetensors.torch import save_file

from piip.export import export_detector
from piip_core.export import ExportError
from piip_tools.flops.executed import executed_count

MASK_RCNN = Path(__file__).with_name("tiny_piip_mask_rcnn.py")
CASCADE = Path(__file__).parents[3] / "projects/PIIP/configs/demo/piip_digits_cascade_mask_rcnn.py"
BLACK, NOISE = torch.zeros(3, 90, 128), torch.rand(3, 90, 128, generator=torch.Generator().manual_seed(1)) * 255


def build(path, **backbone):
    """With heads that say something."""
    config = LazyConfig.load(str(path))
    config.data.num_classes = 3
    config.model.backbone.update(backbone)
    torch.manual_seed(0)
    model = instantiate(config.model).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("cls_score.weight", "bbox_pred.weight")):
                parameter *= 30
    return model


@torch.no_grad()
def check_detections(path, model, images):
    """The file finds what Detectron2 does in a batch; returns how much in each image."""
    batch = torch.stack(images)
    names = ["batch_index", "boxes", "scores", "classes", "masks"]
    index, *found = onnxruntime.InferenceSession(path).run(names, {"image": batch.numpy()})
    counts = []
    for number, image in enumerate(images):
        (expected,) = model.inference([{"image": image}], do_postprocess=False)
        counts.append(len(expected))
        masks = expected.pred_masks[:, 0]
        expected = (expected.pred_boxes.tensor, expected.scores, expected.pred_classes, masks)
        for have, want, tolerance in zip(found, expected, (1e-3, 1e-5, 0, 1e-5), strict=True):
            np.testing.assert_allclose(have[index == number], want, rtol=0, atol=tolerance)
    assert len(index) == sum(counts)
    return counts


def test_detectron2s_analysis_agrees_with_ours():
    """What its tools/analyze_model.py calls; by `_DEFAULT_SUPPORTED_OPS` of fvcore, in piip/modeling/flops.py."""
    detector, inputs = build(MASK_RCNN), [{"image": torch.zeros(3, 96, 128), "height": 96, "width": 128}]
    counts = FlopCountAnalysis(detector, inputs).by_module_and_operator()["model.backbone"]
    products = ("conv", "linear", "scaled_dot_product_attention", "deform_attn_grid")
    ours = executed_count(detector.backbone, torch.zeros(1, 3, 96, 128)).total.macs
    assert counts["deform_attn_grid"] and sum(counts[name] for name in products) == ours
    assert activation_count_operators(detector, inputs)["conv"] > 0
    assert "backbone.bottom_up" in parameter_count_table(detector)


def test_exported_mask_rcnn_finds_the_same(load_tool, tmp_path, capsys):
    model, path, photo = build(MASK_RCNN), tmp_path / "detector.onnx", tmp_path / "black.png"
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    Image.new("RGB", (128, 90)).save(photo)
    arguments = [str(MASK_RCNN), "data.num_classes=3", "--checkpoint", str(tmp_path / "model.safetensors")]
    assert load_tool("export_model").main([*arguments, "--whole", str(photo), "--output", str(path)]) == 0
    assert "images: 90 x 128, RGB, 0 to 255" in capsys.readouterr().out
    assert onnxruntime.InferenceSession(path).get_modelmeta().custom_metadata_map["format"] == '"RGB"'
    grey = torch.full_like(BLACK, 200.0)
    first, none, last = check_detections(path, model, [BLACK, grey, NOISE])
    assert first > 0 == none < last
    assert check_detections(path, model, [grey]) == [0]
    assert check_detections(path, model, [NOISE]) == [last]
    with pytest.raises(ExportError, match="nothing is found in the image: expected one with objects"):
        export_detector(model, path, grey)


def test_exported_cascade_finds_the_same(tmp_path):
    model, path = (
        build(CASCADE, bottom_up=LazyConfig.load(str(MASK_RCNN)).model.backbone.bottom_up),
        tmp_path / "x.onnx",
    )
    export_detector(model, path, BLACK, gridsample=False)
    assert {node.op_type for node in onnx.load(path).graph.node} & {"GridSample", "Gather", "If"} == {"Gather"}
    assert min(check_detections(path, model, [BLACK, NOISE, NOISE.flip(1)])) > 0


def test_other_models_are_refused(tmp_path):
    with pytest.raises(ExportError, match="Conv2d: expected a Mask or Cascade R-CNN"):
        export_detector(torch.nn.Conv2d(3, 1, 1), tmp_path / "x.onnx", BLACK)
