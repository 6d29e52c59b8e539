"""Multi-scale training: sizes against the published ones, and boxes and masks that stay where the pixels are."""

from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("detectron2")

from detectron2.config import instantiate
from detectron2.data.transforms import AugInput
from detectron2.structures import BoxMode
from PIL import Image
from pycocotools import mask as mask_util

from piip.data import MultiScaleCrop
from piip.data.transforms import PolygonCrop
from piip.lazy_config import load_config

COCO_MS = Path(__file__).parents[3] / "projects" / "PIIP" / "configs" / "common" / "coco_ms.py"

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


WIDTH, HEIGHT = 320, 150
# Objects apart from each other, each with a colour of its own: x0, y0, x1, y1. The right of the image is empty
OBJECTS = {(255, 0, 0): (20, 15, 80, 70), (0, 255, 0): (130, 20, 180, 120), (0, 0, 255): (35, 95, 100, 135)}


def record(path, masks):
    """A data set record of OBJECTS, with masks as polygons or run lengths."""
    image = np.zeros((HEIGHT, WIDTH, 3), np.uint8)
    annotations = []
    for category, (colour, (x0, y0, x1, y1)) in enumerate(OBJECTS.items()):
        image[y0:y1, x0:x1] = colour
        bitmap = np.zeros((HEIGHT, WIDTH), np.uint8, order="F")
        bitmap[y0:y1, x0:x1] = 1
        polygons = [[x0, y0, x1, y0, x1, y1, x0, y1]]
        annotations.append(
            {
                "bbox": [x0, y0, x1 - x0, y1 - y0],
                "bbox_mode": BoxMode.XYWH_ABS,
                "category_id": category,
                "iscrowd": 0,
                "segmentation": polygons if masks == "polygons" else mask_util.encode(bitmap),
            }
        )
    Image.fromarray(image).save(path)
    return {"file_name": str(path), "width": WIDTH, "height": HEIGHT, "image_id": 1, "annotations": annotations}


# Masks of run lengths take the nearest pixel in up to two resizes, as published for all masks
@pytest.mark.parametrize(("masks", "outline"), [("polygons", 1), ("run lengths", 3)])
def test_samples_hold_exactly_the_objects_that_are_left_in_the_image(masks, outline, tmp_path):
    """Through flip, both policies and the mapper; what a sample must hold is read off its pixels."""
    mapper = instantiate(load_config(str(COCO_MS), ["data.train.crop=128"]).dataloader.train.mapper)
    sample_record = record(tmp_path / "image.png", masks)
    np.random.seed(2)
    left, both, flipped = [], 0, 0
    for _ in range(200):
        sample = mapper(sample_record)
        image, instances = sample["image"].numpy(), sample["instances"]
        assert instances.image_size == image.shape[1:]
        assert max(instances.image_size) <= 128
        boxes = dict(zip(instances.gt_classes.tolist(), instances.gt_boxes.tensor.numpy(), strict=True))
        drawn = dict(zip(instances.gt_classes.tolist(), instances.gt_masks.tensor.numpy(), strict=True))
        for category, channel in enumerate(image):
            visible = channel > 127
            if visible.any(0).sum() < 3 or visible.any(1).sum() < 3:  # a sliver at the border, or nothing
                assert category not in boxes or min(boxes[category][2:] - boxes[category][:2]) < 4
                continue
            rows, columns = np.nonzero(visible)
            tight = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
            assert np.abs(boxes[category] - tight).max() <= 1.5
            differing = (drawn[category] != visible).sum()
            assert differing <= 2 * outline * (visible.any(0).sum() + visible.any(1).sum())
        left.append(len(instances))
        if {0, 1} <= boxes.keys():
            both += 1
            flipped += boxes[1][0] < boxes[0][0]
    assert set(left) == {0, 1, 2, 3}  # crops without an object are kept
    assert 0.3 < flipped / both < 0.7
