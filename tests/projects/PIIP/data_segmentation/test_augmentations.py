"""The training augmentations against OpenCV, scikit-image and the published rules."""

from __future__ import annotations

import cv2
import numpy as np
import pytest
from skimage import color

pytest.importorskip("detectron2")

from detectron2.data.transforms import AugInput

from piip.data.transforms import KeepRatioResize, PhotometricDistortion, PhotometricTransform


def _change(brightness=0.0, contrast=1.0, contrast_first=False, saturation=None, hue=None):
    return PhotometricTransform(brightness, contrast, contrast_first, saturation, hue)


@pytest.fixture(scope="module")
def picture():
    """Every hue, saturation and value that 8 bits distinguish roughly, and greys."""
    rng = np.random.default_rng(0)
    picture = rng.integers(0, 256, (64, 96, 3), dtype=np.uint8)
    picture[:4] = picture[:4, :, :1]
    return picture


@pytest.mark.parametrize(("ratio", "frame"), [(0.5, (1024, 256)), (0.7331, (1501, 375)), (1.9999, (4095, 1023))])
@pytest.mark.parametrize(("height", "width"), [(90, 130), (131, 80), (30, 400)])
def test_the_frame_is_rounded_down_and_pixels_are_opencv_s(monkeypatch, ratio, frame, height, width):
    rng = np.random.default_rng(1)
    image = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
    labels = rng.integers(0, 150, (height, width), dtype=np.uint8)
    monkeypatch.setattr(np.random, "uniform", lambda low, high: {(0.5, 2.0): ratio}[low, high])
    inputs = AugInput(image, sem_seg=labels)
    KeepRatioResize([(2048, 512)], (0.5, 2.0))(inputs)
    scale = min(frame[0] / max(height, width), frame[1] / min(height, width))
    size = int(width * scale + 0.5), int(height * scale + 0.5)
    assert np.array_equal(inputs.image, cv2.resize(image, size, interpolation=cv2.INTER_LINEAR))
    assert np.array_equal(inputs.sem_seg, cv2.resize(labels, size, interpolation=cv2.INTER_NEAREST))


def test_ratios_cover_their_range():
    np.random.seed(0)
    resize = KeepRatioResize([(512, 2048)], (0.5, 2.0))
    heights = [resize.get_transform(np.zeros((64, 64, 3), np.uint8)).new_h for _ in range(2000)]
    assert 256 <= min(heights) < 262 and 1018 < max(heights) <= 1024
    assert np.mean(heights) == pytest.approx(640, abs=4 * 222 / 2000**0.5)  # the ratio is uniform


def test_brightness_and_contrast_are_cut_and_rounded_down(picture):
    values = picture.astype(np.float64)
    assert np.array_equal(_change(brightness=12.5).apply_image(picture), np.floor(np.minimum(values + 12.5, 255)))
    assert np.array_equal(_change(brightness=-31.75).apply_image(picture), np.floor(np.maximum(values - 31.75, 0)))
    for first in (True, False):
        changed = _change(contrast=1.375, contrast_first=first).apply_image(picture)
        assert np.array_equal(changed, np.floor(np.minimum(values * 1.375, 255)))
    both = _change(brightness=30.0, contrast=0.5, contrast_first=True).apply_image(picture)
    assert np.array_equal(both, np.floor(np.floor(np.minimum(values + 30, 255)) * 0.5))


def test_contrast_comes_before_or_after_saturation(picture):
    before, after = (_change(contrast=1.5, contrast_first=first, saturation=0.5) for first in (True, False))
    dim, pale = _change(contrast=1.5).apply_image, _change(saturation=0.5).apply_image
    assert np.array_equal(before.apply_image(picture), pale(dim(picture)))
    assert np.array_equal(after.apply_image(picture), dim(pale(picture)))
    assert not np.array_equal(pale(dim(picture)), dim(pale(picture)))


@pytest.mark.parametrize(("saturation", "hue"), [(0.5, None), (1.5, None), (None, -18), (None, 17), (1.25, 7)])
def test_saturation_and_hue_are_those_of_scikit_image(picture, saturation, hue):
    hsv = color.rgb2hsv(picture)
    hsv[..., 1] = np.minimum(hsv[..., 1] * (saturation or 1.0), 1.0)
    hsv[..., 0] = (hsv[..., 0] + (hue or 0) / 180) % 1.0
    expected = color.hsv2rgb(hsv) * 255
    found = _change(saturation=saturation, hue=hue).apply_image(picture)
    error = np.abs(found - expected)
    # A step of hue is 2 degrees: up to 255 / 60 levels; each way through 8 bits adds a little
    assert error.max() < 9 and error.mean() < 1.1
    assert np.abs(picture - expected).mean() > 5  # what nothing done would be off by


def test_labels_and_the_given_image_stay(picture):
    labels = np.arange(picture[..., 0].size, dtype=np.uint8).reshape(picture.shape[:2])
    before, kept = picture.copy(), labels.copy()
    inputs = AugInput(picture, sem_seg=labels)
    inputs.transform(_change(20.0, 1.2, True, 1.3, 5))
    assert np.array_equal(picture, before) and not np.array_equal(inputs.image, before)
    assert np.array_equal(inputs.sem_seg, kept)
    assert np.array_equal(_change().apply_image(picture), before)


def test_draws_have_the_published_ranges_and_chances():
    np.random.seed(0)
    count = 4000
    drawn = [PhotometricDistortion().get_transform(np.zeros((1, 1, 3), np.uint8)) for _ in range(count)]
    effects = {
        "brightness": ([t.brightness for t in drawn if t.brightness != 0.0], -32, 32),
        "contrast": ([t.contrast for t in drawn if t.contrast != 1.0], 0.5, 1.5),
        "saturation": ([t.saturation for t in drawn if t.saturation is not None], 0.5, 1.5),
        "hue": ([t.hue for t in drawn if t.hue is not None], -18, 17),
    }
    for values, low, high in effects.values():
        assert len(values) / count == pytest.approx(0.5, abs=4 * 0.5 / count**0.5)
        width = high - low
        assert low <= min(values) < low + width / 50 and high - width / 50 < max(values) <= high
        assert np.mean(values) == pytest.approx((low + high) / 2, abs=4 * width / 12**0.5 / len(values) ** 0.5)
    assert sorted(set(effects["hue"][0])) == list(range(-18, 18))
    together = np.mean([t.contrast_first for t in drawn if t.hue is not None and t.saturation is None])
    assert together == pytest.approx(0.5, abs=0.07)  # drawn for themselves


def test_wrong_arguments_are_named():
    with pytest.raises(ValueError, match="ratio_range="):
        KeepRatioResize([(2048, 512)], (2.0, 0.5))
    with pytest.raises(ValueError, match=r"float32: expected \(H, W, 3\) uint8"):
        _change().apply_image(np.zeros((2, 2, 3), np.float32))
