"""tools/visualize.py on a Detectron2 LazyConfig and its checkpoint."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("detectron2")

from detectron2.config import instantiate

from piip.data import KeepRatioResize
from piip.lazy_config import load_config
from piip.predict import Predictor
from piip_core.visualization import network_input

CONFIG = str(Path(__file__).parents[2] / "projects/PIIP/configs/demo/piip_digits_mask_rcnn.py")
OVERRIDES = ["data.num_classes=3", "data.test.annotations=null", "data.train.annotations=gone.json"]


@pytest.fixture(scope="module")
def tool(load_tool):
    return load_tool("visualize")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("run") / "model.pth"
    torch.save({"model": instantiate(load_config(CONFIG, OVERRIDES).model).state_dict()}, path)
    return str(path)


@pytest.fixture(scope="module")
def original():
    return np.random.default_rng(0).integers(0, 256, (150, 230, 3), dtype=np.uint8)


@pytest.mark.parametrize("image_format", ["RGB", "BGR"])
def test_sees_what_the_detector_sees(tool, checkpoint, original, tmp_path, image_format):
    Image.fromarray(original).save(tmp_path / "photo.png")
    overrides = [*OVERRIDES, f"dataloader.train.mapper.image_format={image_format}"]
    arguments = ["--config-file", CONFIG, "--checkpoint", checkpoint, "--image", str(tmp_path / "photo.png")]
    args = tool.parse_args([*arguments, "--output", "out", "--device", "cpu", "--opts", *overrides])
    name, _, scene = tool.from_config(args, original)

    predictor = Predictor(load_config(CONFIG, overrides), checkpoint, device="cpu")
    seen = []
    predictor.model.backbone.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    predictor(original)
    assert name == "piip_digits_mask_rcnn" and torch.equal(scene.pixel_values, seen[0])
    # 230 x 150 in a frame of 192 x 192
    np.testing.assert_array_equal(
        scene.image, KeepRatioResize([(192, 192)]).get_transform(original).apply_image(original)
    )


def test_files(tool, checkpoint, original, tmp_path):
    Image.fromarray(original).save(tmp_path / "photo.png")
    arguments = ["--config-file", CONFIG, "--checkpoint", checkpoint, "--image", str(tmp_path / "photo.png")]
    tool.main([*arguments, "--output", str(tmp_path / "out"), "--device", "cpu", "--opts", *OVERRIDES])
    facts = json.loads((tmp_path / "out" / "visualization.json").read_text())
    assert (facts["resized_to"], facts["padded_to"], facts["query"]) == ([125, 192], [128, 192], [115, 75])
    assert facts["views"][1]["attention"]["window"] == [0, 9, 9, 18]


def test_own_transform_is_the_published_one(original):
    """Published models by name are prepared without Detectron2: same sizes, pixels within rounding."""
    for size in ((150, 230), (230, 150), (37, 150)):
        image = original[: size[0], : size[1]] if size[0] <= 150 else original.transpose(1, 0, 2)[: size[0], : size[1]]
        frame = {"long_side": 333, "short_side": 200}
        resized, _ = network_input(image, pixel_mean=(0,) * 3, pixel_std=(1,) * 3, pad_divisor=32, **frame)
        expected = KeepRatioResize([tuple(frame.values())]).get_transform(image).apply_image(image)
        assert resized.shape == expected.shape
        assert np.abs(resized.astype(int) - expected).max() <= 1
