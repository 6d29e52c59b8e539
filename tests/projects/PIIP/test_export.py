"""Detectron2's tracing of a detector: its analysis, and the whole detector as a file."""

from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("detectron2")

import onnxruntime
from detectron2.config import LazyConfig, instantiate
from detectron2.utils.analysis import FlopCountAnalysis, activation_count_operators, parameter_count_table

from piip.export import export_detector
from piip_core.export import ExportError
from piip_tools.flops.executed import executed_count


@pytest.fixture(scope="module")
def detector():
    config = LazyConfig.load(str(Path(__file__).with_name("tiny_piip_mask_rcnn.py")))
    config.data.num_classes = 3
    torch.manual_seed(0)
    return instantiate(config.model).eval()


def test_detectron2s_analysis_agrees_with_ours(detector):
    """What tools/analyze_model.py of Detectron2 calls for flop, activation and parameter."""
    inputs = [{"image": torch.zeros(3, 96, 128), "height": 96, "width": 128}]
    counts = FlopCountAnalysis(detector, inputs).by_module_and_operator()["model.backbone"]
    products = ("conv", "linear", "scaled_dot_product_attention", "deform_attn_grid")
    ours = executed_count(detector.backbone, torch.zeros(1, 3, 96, 128)).total.macs
    assert counts["deform_attn_grid"] and sum(counts[name] for name in products) == ours
    assert activation_count_operators(detector, inputs)["conv"] > 0
    assert "backbone.bottom_up" in parameter_count_table(detector)


@torch.no_grad()
def test_exported_detector_finds_the_same(detector, tmp_path):
    path = tmp_path / "detector.onnx"
    check = export_detector(detector, path, (90, 128), metadata={"format": "RGB"})
    assert check.files == (path,)
    session = onnxruntime.InferenceSession(path)
    assert session.get_modelmeta().custom_metadata_map == {"format": "RGB"}
    image = torch.rand(3, 90, 128, generator=torch.Generator().manual_seed(1)) * 255
    boxes, scores, classes, masks = session.run(["boxes", "scores", "classes", "masks"], {"image": image.numpy()})
    (expected,) = detector.inference([{"image": image}], do_postprocess=False)
    assert len(boxes) > 10
    np.testing.assert_array_equal(classes, expected.pred_classes)
    np.testing.assert_allclose(boxes, expected.pred_boxes.tensor, atol=1e-2)
    np.testing.assert_allclose(scores, expected.scores, atol=1e-4)
    np.testing.assert_allclose(masks, expected.pred_masks, atol=1e-4)


def test_other_models_are_refused(tmp_path):
    with pytest.raises(ExportError, match="Conv2d: expected a GeneralizedRCNN"):
        export_detector(torch.nn.Conv2d(3, 1, 1), tmp_path / "x.onnx", (32, 32))
