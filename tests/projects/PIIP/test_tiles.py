"""Detection in tiles of large images, by sahi."""

from __future__ import annotations

import sys

import numpy as np
import pytest

pytest.importorskip("detectron2")
pytest.importorskip("sahi", reason='needs pip install "piip[tiles]"')

import torch
from detectron2.structures import Boxes, Instances
from scipy import ndimage

from piip.data import Category
from piip.tiles import detect_in_tiles
from piip_core.errors import UserError


class _Finder:
    """Stands in for a detector: finds what is bright; class 1 has a hole."""

    categories = (Category(40, "disc"), Category(3, "ring"))
    device = torch.device("cpu")

    def __init__(self, *, masks: bool) -> None:
        self.masks, self.seen = masks, []

    def __call__(self, image: np.ndarray, *, min_score: float) -> Instances:
        self.seen.append(image.shape[:2])
        parts, count = ndimage.label(image.max(axis=2) > 100)
        masks = np.array([parts == k + 1 for k in range(count)], dtype=bool).reshape(-1, *image.shape[:2])
        holes = [int(ndimage.binary_fill_holes(mask).sum() > mask.sum()) for mask in masks]
        scores = torch.tensor([min(mask.sum() / 1000, 1.0) for mask in masks], dtype=torch.float32)
        slices = ndimage.find_objects(parts)
        boxes = torch.tensor([[x.start, y.start, x.stop, y.stop] for y, x in slices], dtype=torch.float32)
        found = Instances(image.shape[:2], pred_boxes=Boxes(boxes.reshape(-1, 4)), scores=scores)
        found.pred_classes = torch.tensor(holes, dtype=torch.int64)
        if self.masks:
            found.pred_masks = torch.from_numpy(masks)
        return found[scores >= min_score]


@pytest.fixture(scope="module")
def image() -> np.ndarray:
    """Two discs and two rings, none larger than what tiles share."""
    image = np.zeros((150, 200, 3), dtype=np.uint8)
    y, x = np.ogrid[:150, :200]
    for (cy, cx), outer, inner in (((20, 30), 9, 0), ((120, 170), 10, 0), ((60, 90), 8, 3), ((110, 60), 9, 4)):
        distance = np.hypot(y - cy, x - cx)
        image[(distance <= outer) & (distance >= inner)] = 200
    return image


@pytest.mark.parametrize("masks", [True, False])
@pytest.mark.parametrize("whole", [True, False])
def test_tiles_find_what_the_whole_image_holds(image, masks, whole):
    finder = _Finder(masks=masks)
    expected = finder(image, min_score=0.1)
    expected = expected[expected.scores.argsort(descending=True)]
    finder.seen.clear()
    found = detect_in_tiles(finder, image, 100, min_score=0.1, overlap=0.3, whole=whole)
    assert finder.seen == [(100, 100)] * 6 + [(150, 200)] * whole
    torch.testing.assert_close(found.pred_boxes.tensor, expected.pred_boxes.tensor, rtol=0, atol=0)
    torch.testing.assert_close(found.scores, expected.scores)
    assert found.pred_classes.tolist() == expected.pred_classes.tolist() == [0, 0, 1, 1]
    assert found.has("pred_masks") == masks
    if masks:
        assert torch.equal(found.pred_masks, expected.pred_masks)


@pytest.mark.parametrize("masks", [True, False])
def test_what_tiles_cut_is_found_in_the_whole(masks):
    image = np.zeros((100, 170, 3), dtype=np.uint8)
    image[40:50, 60:130] = 200
    (box,) = detect_in_tiles(_Finder(masks=masks), image, 100, overlap=0.3, min_score=0.1).pred_boxes
    assert box.tolist() == [60, 40, 130, 50]


@pytest.mark.parametrize("masks", [True, False])
def test_an_empty_image(masks):
    found = detect_in_tiles(_Finder(masks=masks), np.zeros((70, 90, 3), dtype=np.uint8), 64, min_score=0.5)
    assert (len(found), found.has("pred_masks")) == (0, masks)
    assert found.pred_boxes.tensor.shape == (0, 4)


def test_without_sahi(monkeypatch):
    monkeypatch.setitem(sys.modules, "sahi.models.detectron2", None)
    with pytest.raises(UserError, match=r'tiles need the package sahi.*pip install "piip\[tiles\]"$'):
        detect_in_tiles(_Finder(masks=False), np.zeros((70, 90, 3), dtype=np.uint8), 64)
