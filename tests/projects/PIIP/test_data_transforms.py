"""The image pipeline against numbers that OpenCV and the public code produced."""

from __future__ import annotations

import hashlib
import json

import numpy as np
import pytest

pytest.importorskip("detectron2")

import torch
from detectron2.config import instantiate
from detectron2.data.transforms import ResizeShortestEdge
from safetensors.torch import load_file

from checkers.detection.pipeline import network_input
from piip.data import KeepRatioResize
from piip.data.transforms import OpenCVResizeTransform, keep_ratio_size
from piip.lazy_config import load_config


def _sha256(array: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()


def _golden(repo_root, name):
    path = repo_root / "tests" / "data" / "goldens" / name
    case = json.loads(path.with_suffix(".json").read_text())
    pipeline = case["config"]["pipeline"][0]
    steps = {step["type"]: step for step in pipeline["transforms"]}
    settings = {
        "mean": steps["Normalize"]["mean"],
        "std": steps["Normalize"]["std"],
        "size_divisibility": steps["Pad"]["size_divisor"] if "Pad" in steps else 0,
    }
    return case["images"], load_file(path.with_suffix(".safetensors")), pipeline["img_scale"], settings


@pytest.mark.parametrize("name", ["pipe_det_1568", "pipe_det_1333", "pipe_seg_512"])
def test_test_time_pipeline_equals_the_public_one_bit_for_bit(repo_root, formula_image, name):
    images, tensors, scale, settings = _golden(repo_root, name)
    for entry in images:
        k = entry["k"]
        image = formula_image(*entry["ori_shape"], k)
        assert _sha256(image) == entry["input_sha256"]
        augmentation = KeepRatioResize([(np.inf, min(scale)) if name == "pipe_seg_512" else scale])
        assert _sha256(augmentation.get_transform(image).apply_image(image)) == entry["resized_u8_bgr_sha256"]

        tensor = network_input(image, [augmentation], image_format="BGR", **settings)[0]
        assert list(tensor.shape) == entry["tensor_shape"]
        y, x = tensors[f"output.pixels_yx.{k}"].long().T
        assert torch.equal(tensor[:, y, x], tensors[f"output.pixels.{k}"])
        for i, (top, left) in enumerate(entry["crop_origins_yx"]):
            crop = tensors[f"output.crop{i}.{k}"]
            assert torch.equal(tensor[:, top : top + crop.shape[1], left : left + crop.shape[2]], crop)
        torch.testing.assert_close(
            tensor.double().sum((1, 2)), tensors[f"output.channel_sum.{k}"], rtol=1e-12, atol=1e-6
        )


@pytest.mark.parametrize("name", ["pipe_det_1568", "pipe_det_1333"])
def test_detectron2_model_normalises_and_pads_to_the_same_tensor(repo_root, formula_image, tiny_config, name):
    images, _, scale, settings = _golden(repo_root, name)
    cfg = load_config(tiny_config)
    cfg.model.pixel_mean, cfg.model.pixel_std = settings["mean"], settings["std"]
    model = instantiate(cfg.model)
    model.backbone._size_divisibility = settings["size_divisibility"]
    cfg.data.test.scales = [tuple(scale)]
    for entry in images:
        image = formula_image(*entry["ori_shape"], entry["k"])[:, :, ::-1]  # RGB, as the mapper reads it
        augmentations = list(instantiate(cfg.dataloader.test.mapper.augmentations))
        resized = augmentations[0].get_transform(image).apply_image(image)
        inside = model.preprocess_image([{"image": torch.from_numpy(resized.transpose(2, 0, 1).copy())}])
        assert torch.equal(inside.tensor, network_input(image, augmentations, **settings))


def test_resize_equals_opencv_bit_for_bit(repo_root, formula_image):
    cases = json.loads((repo_root / "tests" / "data" / "goldens" / "opencv_resize.json").read_text())["cases"]
    assert len(cases) == 40
    for case in cases:
        image = formula_image(*case["old"], case["k"], case["channels"])
        transform = OpenCVResizeTransform(*case["old"], *case["new"])
        assert _sha256(transform.apply_image(image)) == case["bilinear_sha256"], case
        assert _sha256(transform.apply_segmentation(image)) == case["nearest_sha256"], case


# Counted with the public code on 640-pixel sides and 150 to 700 pixels on the other
@pytest.mark.parametrize(
    ("long", "short", "differing"), [(1120, 672, 10), (1344, 806, 4), (1568, 941, 0), (1333, 800, 0)]
)
def test_keep_ratio_differs_from_detectron2_only_at_known_ties(long, short, differing):
    sizes = [(height, 640) for height in range(150, 701)]
    ours = [keep_ratio_size(*size, long, short) for size in sizes]
    theirs = [ResizeShortestEdge.get_output_shape(*size, short, long) for size in sizes]
    assert sum(a != b for a, b in zip(ours, theirs, strict=True)) == differing


def test_short_side_is_exact_and_the_long_one_unlimited():
    generator = np.random.default_rng(0)
    for height, width in [(1, 1), (7, 9000), *generator.integers(1, 3000, (500, 2))]:
        size = keep_ratio_size(int(height), int(width), np.inf, 512)
        assert min(size) == 512
        exact = [512 * side / min(height, width) for side in (height, width)]
        assert max(abs(np.subtract(size, exact))) <= 0.5


def test_coordinates_follow_the_pixels():
    transform = OpenCVResizeTransform(40, 60, 100, 90)
    mask = np.zeros((40, 60), dtype=bool)
    mask[8:20, 30:48] = True
    resized = transform.apply_segmentation(mask)
    assert resized.dtype == bool
    rows, columns = np.flatnonzero(resized.any(1)), np.flatnonzero(resized.any(0))
    tight = np.array([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1], dtype=float)
    box = transform.apply_box(np.array([[30.0, 8.0, 48.0, 20.0]]))[0]
    np.testing.assert_allclose(box, [45.0, 20.0, 72.0, 50.0])
    assert np.abs(box - tight).max() <= 1.5  # nearest neighbour moves an edge by at most half a source pixel
    polygon = np.array([[30.0, 8.0], [48.0, 8.0], [48.0, 20.0]])
    there = transform.apply_polygons([polygon.copy()])
    np.testing.assert_allclose(transform.inverse().apply_polygons(there)[0], polygon)


def test_whole_number_boxes_are_scaled_too():
    """Annotation files may hold integers, which numpy does not multiply in place."""
    transform = OpenCVResizeTransform(100, 200, 150, 500)
    box = transform.apply_box(np.array([[2, 4, 20, 40]]))
    np.testing.assert_allclose(box, [[5, 6, 50, 60]])


def test_one_of_several_scales_is_drawn():
    image = np.zeros((100, 200, 3), dtype=np.uint8)
    augmentation = KeepRatioResize([(300, 200), (100, 150)])
    np.random.seed(0)
    widths = {augmentation.get_transform(image).new_w for _ in range(30)}
    assert widths == {300, 150}


def test_what_cannot_be_resized_is_refused():
    with pytest.raises(TypeError, match="expected uint8"):
        OpenCVResizeTransform(4, 4, 8, 8).apply_image(np.zeros((4, 4, 3), dtype=np.float32))
    with pytest.raises(ValueError, match="long side, short side"):
        KeepRatioResize([1333])
    with pytest.raises(ValueError, match="long side, short side"):
        KeepRatioResize([(np.inf, 0)])
    with pytest.raises(ValueError, match="made for"):
        OpenCVResizeTransform(4, 4, 8, 8).apply_image(np.zeros((5, 4, 3), dtype=np.uint8))
