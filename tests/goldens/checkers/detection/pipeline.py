"""Cases of test-time pipelines: from an image to the network's input."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from detectron2.data.transforms import AugInput, Augmentation, AugmentationList
from detectron2.structures import ImageList
from torch import Tensor

from checkers import Check, GoldenCase
from piip.data import KeepRatioResize
from piip_core.errors import NotSupportedYet

from .model import require


def verify_test_pipeline(case: GoldenCase) -> Check:
    """Resizing, normalisation and padding of the synthetic images of the case, pixel by pixel and in sums."""
    check = Check(case)
    pipeline = case.config["pipeline"][-1]  # the image is loaded already
    steps = {step["type"]: step for step in pipeline["transforms"]}
    require("flip", pipeline["flip"], False)
    require("to_rgb", steps["Normalize"]["to_rgb"], True)
    resize = _resize(pipeline["img_scale"], steps)
    for index, image in enumerate(case.info["images"]):
        pixels = synthetic_image(case, image)
        tensor = network_input(
            pixels,
            [resize],
            mean=steps["Normalize"]["mean"],
            std=steps["Normalize"]["std"],
            size_divisibility=steps["Pad"]["size_divisor"] if "Pad" in steps else 0,
            image_format="BGR",
        )[0]
        resized = resize.get_transform(pixels).apply_image(pixels)
        _check_resized(check, index, image, pixels, resized)
        _check_tensor(check, index, image, tensor)
    return check


def _resize(scale: Sequence[int], steps: Mapping[str, Mapping[str, Any]]) -> Augmentation:
    """The resizing of a detection or a segmentation pipeline; the latter does not pad."""
    kind = set(steps) - {"RandomFlip", "Normalize", "ImageToTensor", "Collect"}
    if kind == {"Resize", "Pad"}:
        require("keep_ratio", steps["Resize"].get("keep_ratio"), True)
        return KeepRatioResize([scale])
    if kind == {"SETR_Resize"}:
        settings = steps["SETR_Resize"]
        require("keep_ratio and setr_multi_scale", settings["keep_ratio"] and settings["setr_multi_scale"], True)
        return KeepRatioResize([(np.inf, max(min(scale), settings["crop_size"][0]))])
    raise NotSupportedYet(f"test pipeline with {', '.join(sorted(kind))}")


def network_input(
    image: np.ndarray,
    augmentations: Sequence[Augmentation],
    *,
    mean: Sequence[float],
    std: Sequence[float],
    size_divisibility: int,
    image_format: str = "RGB",
) -> Tensor:
    """Resizes, normalises and pads (H, W, 3) uint8 as `dataloader.test.mapper` and `GeneralizedRCNN` do together.

    Returns:
        (1, 3, H', W') float32, channels in RGB order.
    """
    inputs = AugInput(image[:, :, ::-1] if image_format == "BGR" else image)
    AugmentationList(augmentations)(inputs)
    resized = torch.as_tensor(np.ascontiguousarray(inputs.image.transpose(2, 0, 1)))
    normalised = (resized - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    return ImageList.from_tensors([normalised], size_divisibility).tensor


def synthetic_image(case: GoldenCase, image: Mapping[str, Any]) -> np.ndarray:
    """The image (H, W, 3) uint8 in BGR order that the case describes by a formula.

    Raises:
        NotSupportedYet: If the case has another formula: the result has not the recorded digest.
    """
    k, (height, width) = image["k"], image["ori_shape"][:2]
    y, x, c = np.ogrid[:height, :width, :3]
    y, x, c = (axis.astype(np.int64) for axis in (y, x, c))
    blocks = 60 * ((x // (5 + k) + y // 7) % 2)
    noise = (7919 * x + 104729 * y + 1299709 * c + (31 + k) * x * y) // 64 % 64
    pixels = ((3 * x + 2 * y + 40 * c + blocks + noise) % 256).astype(np.uint8)
    if hashlib.sha256(pixels.tobytes()).hexdigest() != image["input_sha256"]:
        raise NotSupportedYet(f"image {k} by the formula {case.info['input_formula']!r}")
    return pixels


def _check_resized(check: Check, index: int, image: Mapping[str, Any], pixels: np.ndarray, resized: np.ndarray) -> None:
    places = check.case.tensors[f"output.pixels_yx.{index}"].long()
    check.equal(f"output.pixels_yx.{index}", places)  # an input by nature: where to look
    values = torch.from_numpy(resized)[places[:, 0], places[:, 1]]
    check.equal(f"output.pixels_u8.{index}", values)
    digest = hashlib.sha256(np.ascontiguousarray(resized).tobytes()).hexdigest()
    same = torch.tensor([digest == image["resized_u8_bgr_sha256"]])
    check.equal(f"resized_u8_bgr_sha256.{index}", same, torch.tensor([True]))
    new, old = resized.shape[1::-1], pixels.shape[1::-1]
    factors = torch.tensor([new[axis] / old[axis] for axis in (0, 1, 0, 1)], dtype=torch.float32)
    check.close(f"output.scale_factor.{index}", factors)


def _check_tensor(check: Check, index: int, image: Mapping[str, Any], tensor: Tensor) -> None:
    shape = torch.tensor(tensor.shape)
    check.equal(f"tensor_shape.{index}", shape, torch.tensor(image["tensor_shape"]))
    places = check.case.tensors[f"output.pixels_yx.{index}"].long()
    check.close(f"output.pixels.{index}", tensor[:, places[:, 0], places[:, 1]])
    for crop, (y, x) in enumerate(image["crop_origins_yx"]):
        name = f"output.crop{crop}.{index}"
        height, width = check.case.tensors[name].shape[1:]
        check.close(name, tensor[:, y : y + height, x : x + width])
    check.close(f"output.channel_sum.{index}", tensor.double().sum(dim=(1, 2)))
    check.close(f"output.channel_abs_sum.{index}", tensor.double().abs().sum(dim=(1, 2)))
