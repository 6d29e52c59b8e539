"""Multi-scale training: sizes against the published ones, and boxes and masks that stay where the pixels are."""

import numpy as np
import pytest

pytest.importorskip("detectron2")

from detectron2.data.transforms import AugInput
from pycocotools import mask as mask_util

from piip.data import MultiScaleCrop
from piip.data.multi_scale import PolygonCrop

# crop -> short sides, long side, first short sides, first crop, as in the published settings
PUBLISHED = {
    1024: (range(480, 801, 32), 1333, (400, 500, 600), (384, 600)),
    1536: (range(720, 1201, 48), 1999, (600, 750, 900), (576, 900)),
    1792: (range(840, 1401, 56), 2332, (700, 875, 1050), (672, 1050)),
}


@pytest.mark.parametrize("crop", PUBLISHED)
def test_sizes_are_the_published_ones(crop):
    short_sides, long_side, first_sides, first_crop = PUBLISHED[crop]
    augmentation = MultiScaleCrop(crop)
    (resize,), (first, inner, second) = (policy.augs for policy in augmentation._policies)
    assert resize.scales == second.scales == [(long_side, side) for side in short_sides]
    assert first.scales == [(long_side, side) for side in first_sides]
    assert (inner.crop_type, inner.crop_size) == ("absolute_range", first_crop)
    assert augmentation._crop.crop_size == (crop, crop)


def test_drawn_images_have_sizes_of_both_policies():
    """A square image resized by the first policy keeps its shape; the second one's inner crop changes it."""
    np.random.seed(0)
    augmentation, squares, sides = MultiScaleCrop(64), 0, set()
    for _ in range(300):
        inputs = AugInput(np.zeros((200, 200, 3), np.uint8))
        augmentation(inputs)
        height, width = inputs.image.shape[:2]
        assert max(height, width) <= 64
        squares += height == width
        sides.add(min(height, width))
    assert sides >= {30, 32, 34, 36, 38, 40, 42, 44, 46, 48, 50}  # 480 to 800, scaled by 1/16
    assert 150 <= squares < 250  # one half, and some crops that happen to be square


def test_boxes_and_polygons_follow_the_pixels():
    """A bright rectangle is where its transformed box and its drawn polygon say it is."""
    np.random.seed(1)
    augmentation, found = MultiScaleCrop(128), 0
    for _ in range(60):
        image = np.zeros((150, 210, 3), np.uint8)
        x0, y0, x1, y1 = 60, 40, 130, 110
        image[y0:y1, x0:x1] = 255
        polygon = np.array([[x0, y0], [x1, y0], [x1, y1], [x0, y1]], dtype=np.float64)
        inputs = AugInput(image)
        transforms = augmentation(inputs)
        height, width = inputs.image.shape[:2]
        bright = inputs.image[..., 0] > 127
        box = transforms.apply_box(np.array([[x0, y0, x1, y1]]))[0].clip(min=0)
        box = np.minimum(box, [width, height, width, height])
        (moved,) = transforms.apply_polygons([polygon.copy()])
        drawn = mask_util.decode(mask_util.frPyObjects([moved.reshape(-1)], height, width))[..., 0].astype(bool)
        if bright.sum() < 50:
            assert drawn.sum() < 150
            continue
        found += 1
        assert (drawn & bright).sum() / (drawn | bright).sum() > 0.9
        rows, columns = np.nonzero(bright)
        assert np.abs(box - [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]).max() <= 1.5
    assert found > 40


def test_crops_leave_the_annotations_of_the_caller_alone():
    np.random.seed(0)
    crop = PolygonCrop("absolute_range", (8, 16)).get_transform(np.zeros((64, 64, 3), np.uint8))
    points = np.array([[20, 30], [40, 50]])
    assert (crop.apply_coords(points) == points - [crop.x0, crop.y0]).all()
    assert (points == [[20, 30], [40, 50]]).all()


@pytest.mark.parametrize("crop", [0, 16, "1024", 10.5])
def test_unusable_crops_are_named(crop):
    with pytest.raises(ValueError, match=f"crop={crop!r}"):
        MultiScaleCrop(crop)


def test_later_steps_cannot_be_known_beforehand():
    with pytest.raises(NotImplementedError, match="call the augmentation"):
        MultiScaleCrop(64).get_transform(np.zeros((8, 8, 3), np.uint8))
