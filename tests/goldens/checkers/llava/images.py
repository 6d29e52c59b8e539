"""Cases of pictures: from a file or an array to the input of the vision tower."""

from __future__ import annotations

import base64
import hashlib
import io
import math
import re
from collections.abc import Mapping
from typing import Any

import numpy as np
import PIL
import torch
from PIL import Image
from torch import Tensor

from checkers import Check, Comparison, GoldenCase
from llava_piip.image_processing import ImageError, PIIPImageProcessor, rgb_image
from piip_core.errors import NotSupportedYet

_PATH = re.compile(r"(\w+_(?:no)?pad)_(\d+)")  # a way, such as train_pad, and the size of the result


def verify_preprocess(case: GoldenCase) -> Check:
    """One array with and without padding."""
    check = Check(case)
    pixels = case.tensors["input.image_u8"].numpy()
    for name, pad in (("output.pad", True), ("output.nopad", False)):
        processor = PIIPImageProcessor(size=case.info["size"], pad_to_square=pad)
        check.close(name, processor(pixels, return_tensors="pt")["pixel_values"][0])
    return check


def verify_image_modes(case: GoldenCase) -> Check:
    """Files of many kinds on the ways of training and evaluation.

    Where the public code stops at a good picture, ours has to give pixel values, the padded ones if it stopped because
    it did not convert a gray picture before padding; where it gives nonsense ("skip_equality"), the shape is compared.
    Digests are compared under the Pillow they were recorded with.
    """
    check = Check(case)
    for picture in case.info["cases"]:
        name, data = picture["case"], base64.b64decode(picture["file_base64"])
        skipped = case.info.get("skip_equality", {}).get(name, [])
        _check_file(check, name, data, picture["file"])
        _check_rgb(check, name, data, picture["rgb_sha256"], skip="all" in skipped)
        for path in sorted(set(picture) - {"case", "file_base64", "file", "rgb_sha256"}):
            skip = "all" in skipped or path in skipped
            _check_path(check, f"{name}.{path}", data, path, picture, skip=skip)
    return check


def _check_file(check: Check, name: str, data: bytes, recorded: Mapping[str, Any]) -> None:
    try:
        image = Image.open(io.BytesIO(data))
        ours = {"mode": image.mode, "size_wh": list(image.size), "format": image.format}
    except Image.UnidentifiedImageError:
        ours = {"exception": "UnidentifiedImageError"}
    check.same(f"{name}.file", ours, {key: recorded.get(key) for key in ours})


def _check_rgb(check: Check, name: str, data: bytes, recorded: Mapping[str, str], *, skip: bool) -> None:
    try:
        pixels = np.asarray(rgb_image(Image.open(io.BytesIO(data))))
    except (ImageError, Image.UnidentifiedImageError):
        check.same(f"{name}.rgb", True, "exception" in recorded)
        return
    check.same(f"{name}.rgb", [pixels.ndim, "sha" in recorded], [3, True])
    if not skip and _same_library(check):
        check.same(f"{name}.rgb_sha256", hashlib.sha256(pixels.tobytes()).hexdigest(), recorded["sha"])


def _check_path(check: Check, name: str, data: bytes, path: str, picture: Mapping[str, Any], *, skip: bool) -> None:
    if not (match := _PATH.fullmatch(path)):
        raise NotSupportedYet(f"way of preparing images {path!r}")
    kind, size = match.groups()
    recorded = picture[path]
    converts = "no_convert" not in kind
    processor = PIIPImageProcessor(
        size=int(size), pad_to_square=not kind.endswith("_nopad"), convert_before_padding=converts
    )
    try:
        pixels = processor(Image.open(io.BytesIO(data)), return_tensors="pt")["pixel_values"][0]
    except (ImageError, Image.UnidentifiedImageError):
        check.same(name, [True, True], ["exception" in found for found in (picture["rgb_sha256"], recorded)])
        return
    if "exception" in recorded and not converts:
        recorded = picture.get(f"train_pad_{size}", recorded)  # public: no padding colour for gray pictures
    if skip or "exception" in recorded:
        check.same(name, [*pixels.shape, bool(pixels.isfinite().all())], [3, int(size), int(size), True])
        return
    _compare(check, name, pixels, recorded)
    if _same_library(check):
        mean, std = (torch.tensor(values).view(3, 1, 1) for values in (processor.image_mean, processor.image_std))
        levels = ((pixels * std + mean) * 255).round().byte().permute(1, 2, 0).contiguous().numpy()
        check.same(f"{name}.uint8", hashlib.sha256(levels.tobytes()).hexdigest(), recorded["uint8_sha256"])


def _compare(check: Check, name: str, pixels: Tensor, recorded: Mapping[str, Any]) -> None:
    tolerance = check.case.info["tolerance"]
    check.same(f"{name}.shape", list(pixels.shape), recorded["shape"])
    y, x = torch.tensor(recorded["points_yx"]).unbind(1)
    _near(check, f"{name}.values", pixels[:, y, x].T, recorded["values"], tolerance["atol_values"])
    atol = tolerance["atol_mean"]
    _near(check, f"{name}.mean", pixels.double().mean((1, 2)), recorded["mean"], atol)
    _near(check, f"{name}.std", pixels.double().std((1, 2), unbiased=False), recorded["std"], atol)
    mean_abs = recorded["abs_sum"] / pixels.numel()
    _near(check, f"{name}.abs_sum", pixels.double().abs().mean(), mean_abs, atol)


def _near(check: Check, name: str, ours: Tensor, recorded: Any, atol: float) -> None:
    reference = torch.tensor(recorded, dtype=torch.float64)
    passed = ours.shape == reference.shape
    difference = (ours.double() - reference).abs().max().item() if passed else math.inf
    detail = "" if passed else f"shape {tuple(ours.shape)}, expected {tuple(reference.shape)}"
    check.comparisons.append(Comparison(name, difference, difference <= atol, detail))


def _same_library(check: Check) -> bool:
    return PIL.__version__ == check.case.info["pillow"]
