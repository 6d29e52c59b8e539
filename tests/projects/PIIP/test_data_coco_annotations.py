"""Every field of COCO-format files: what it means, that it is refused, or that it is counted; never a wrong number."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("detectron2")

import pycocotools.mask as mask_util
import torch
from detectron2.config import instantiate
from detectron2.structures import Boxes, Instances
from omegaconf import OmegaConf

from piip.data import DatasetError, build_coco_evaluator, get_coco_dicts
from piip.lazy_config import load_config

_BOM = b"\xef\xbb\xbf"
_BOXES = {1: [10, 10, 30, 20], 2: [50, 30, 40, 40]}  # by category id, in every image of `two_objects`


def _polygon(box: list[float]) -> list[float]:
    x, y, w, h = box
    return [x, y, x + w, y, x + w, y + h, x, y + h]


@dataclass
class _Case:
    """Two objects in each of three images of 100 x 80 pixels."""

    folder: Path
    data: dict[str, Any] = field(init=False)

    def __post_init__(self) -> None:
        for number in (1, 2, 3):
            (self.folder / f"{number}.png").touch()  # nothing opens them
        objects = [(image, category, box) for image in (1, 2, 3) for category, box in _BOXES.items()]
        self.data = {
            "images": [{"id": n, "file_name": f"{n}.png", "width": 100, "height": 80} for n in (1, 2, 3)],
            "categories": [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}],
            "annotations": [
                {
                    "id": n,
                    "image_id": image,
                    "category_id": category,
                    "bbox": box,
                    "area": box[2] * box[3],
                    "iscrowd": 0,
                }
                | {"segmentation": [_polygon(box)]}
                for n, (image, category, box) in enumerate(objects, start=1)
            ],
        }

    def set(self, key: str, *values: Any) -> None:
        """Gives the first annotations these values; ... takes the key away."""
        for annotation, value in zip(self.data["annotations"], values, strict=False):
            annotation[key] = value
            if value is ...:
                del annotation[key]

    def write(self, start: bytes = b"", encoding: str = "utf-8") -> Path:
        path = self.folder / "annotations.json"
        path.write_bytes(start + json.dumps(self.data).encode(encoding))
        return path

    def trained(self, **kwargs: Any) -> list[dict[str, Any]]:
        """Objects that are trained on."""
        records = get_coco_dicts(str(self.write()), str(self.folder), **kwargs)
        return [annotation for record in records for annotation in record["annotations"] if not annotation["iscrowd"]]


@pytest.fixture
def case(tmp_path: Path) -> _Case:
    return _Case(tmp_path)


_FULL = {"bbox": pytest.approx(100), "segm": pytest.approx(100)}
_RLE = {"size": [80, 100], "counts": [810, 20, 60, 20, 7090]}


@pytest.mark.parametrize(
    ("key", "values"),
    [
        ("iscrowd", [..., None, "0", False, 0.0]),
        ("area", [..., None, "600", math.nan, [], True]),
        ("area", [-1] * 6),  # pycocotools ignores what is not in 0 to 1e10
        ("area", [1e11] * 6),
        ("id", [0, 1, 2, 3, 4, 5]),
        ("id", [-1, -2]),
        ("id", [2**63 + 1, 2**63 + 2, 2**200]),
        ("id", [7, 7, 7]),
        ("id", [..., None, "a", 1.5, True, []]),
        ("image_id", [1.0]),
        ("category_id", [1.0]),
        ("segmentation", [_polygon(_BOXES[1])]),  # flat
        ("segmentation", [[_polygon(_BOXES[1]), [1, 1, 2, 2]]]),  # a part without area
        ("segmentation", [_RLE]),
        ("segmentation", [{"size": [80.0, 100.0], "counts": mask_util.frPyObjects(_RLE, 80, 100)["counts"].decode()}]),
        ("ignore", [0, None, False, "0"]),
    ],
)
def test_what_can_be_meant_is_trained_on_and_evaluated(case, perfect_ap, key, values):
    case.set(key, *values)
    assert len(case.trained(require_masks=True)) == 6
    assert perfect_ap(case.write(), case.folder, masks=True) == _FULL
    assert perfect_ap(case.write(), case.folder, masks=False) == {"bbox": _FULL["bbox"]}


@pytest.mark.parametrize("value", [1, True, "1", 1.0])
def test_a_crowd_is_neither_trained_on_nor_counted(case, perfect_ap, value):
    case.set("iscrowd", *[value] * 5)
    assert [a["bbox"] for a in case.trained()] == [_BOXES[2]]
    assert perfect_ap(case.write(), case.folder, masks=True) == _FULL


@pytest.mark.parametrize(
    ("mask", "words"),
    [
        (..., "missing or empty: expected polygons"),
        (None, "missing or empty: expected polygons"),
        ([], "missing or empty: expected polygons"),
        ([[10, 10, 40, 10, 40, 30, math.nan, 30]], "polygon with coordinate nan: expected -1000 to 1000"),
        ([[math.nan, 10, 40, 10, 40, 30, 10, 30]], "polygon with coordinate nan"),
        ([[10, 10, 40, 10, 40, 30, math.inf, 30]], "polygon with coordinate inf"),
        ([[10, 10, 2e8, 10, 40, 30, 10, 30]], "polygon with coordinate 200000000.0"),
        ([[10, 10, 10**400, 10, 40, 30, 10, 30]], "polygon with coordinate 1000"),
        ([[10, 10, 40, 10, 40, 30, None, 30]], "polygon with null: expected numbers"),
        ([["10", "10", "40", "10", "40", "30"]], 'polygon with "10": expected numbers'),
        ([[10, 10, 40, 10, 40, 30, True, 30]], "polygon with true"),
        ([[[10, 10], [40, 10], [40, 30]]], "polygon with [10, 10]"),
        ([10, 10, 40, 10, 40], "polygon of 5 numbers: expected pairs"),
        ([[10, 10, 40, 10, 40, 30, 10]], "polygon of 7 numbers: expected pairs"),
        ([[10, 10, 40, 30]], "expected x, y of at least three points"),
        ([[]], "expected x, y of at least three points"),
        ([_polygon(_BOXES[1]), 5], "5 among polygons"),
        ("polygon", "'polygon': expected polygons or a run-length encoding"),
        (7, "7: expected polygons or a run-length encoding"),
        ({"size": [80, 100]}, "counts None: expected lengths of runs"),
        ({"counts": [8000]}, "size None: expected [height, width] = [80, 100]"),
        ({**_RLE, "size": [100, 80]}, "size [100, 80]: expected [height, width] = [80, 100]"),
        ({**_RLE, "size": "80"}, "size '80'"),
        ({**_RLE, "counts": [810, 20, 890, 20, 970, 20]}, "counts add up to 2730: expected height * width = 8000"),
        ({**_RLE, "counts": [100, 50]}, "counts add up to 150"),
        ({**_RLE, "counts": [100, 50, 7850, 1]}, "counts add up to 8001"),
        ({**_RLE, "counts": [100, -50, 7950]}, "counts [100, -50, 7950]: expected lengths of runs"),
        ({**_RLE, "counts": [100.0, 7900]}, "expected lengths of runs"),
        ({**_RLE, "counts": [2**32, 8000]}, "counts add up to 4294975296"),
        ({**_RLE, "counts": [[100, 50, 7850]]}, "expected lengths of runs"),
        ({**_RLE, "counts": ["abc"]}, "expected lengths of runs"),
        ({**_RLE, "counts": ""}, "expected lengths of runs"),
        ({**_RLE, "counts": "a b"}, "expected lengths of runs"),
        ({**_RLE, "counts": "oooooooooooooo"}, "expected lengths of runs"),
        ({**_RLE, "counts": "PPYo1"}, "counts"),
    ],
)
def test_a_mask_that_is_none_is_refused_and_leaves_its_box_to_models_without_masks(case, perfect_ap, mask, words):
    case.set("segmentation", mask)
    for use in (
        lambda: case.trained(require_masks=True),
        lambda: perfect_ap(case.write(), case.folder, masks=True),
    ):
        with pytest.raises(DatasetError) as error:
            use()
        message = str(error.value)
        assert "annotations.json: 1 x annotation w" in message and "annotation 1 (" in message and words in message
        assert "use_instance_mask=False" in message and "\n" not in message
    assert len(case.trained()) == 6
    assert perfect_ap(case.write(), case.folder, masks=False) == {"bbox": _FULL["bbox"]}


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("bbox", {"x": 1}, "'bbox' is not four finite numbers"),
        ("bbox", None, "'bbox' is not four finite numbers"),
        ("bbox", ["1", "2", "3", "4"], "'bbox' is not four finite numbers"),
        ("bbox", [1, 2, math.inf, 4], "'bbox' is not four finite numbers"),
        ("bbox", [1, 2, True, 4], "'bbox' is not four finite numbers"),
        ("bbox", [1, 2, 1e308, 4], "'bbox' is not four finite numbers"),
        ("iscrowd", "yes", "'iscrowd' or 'ignore' is not 0 or 1"),
        ("iscrowd", 2, "'iscrowd' or 'ignore' is not 0 or 1"),
        ("iscrowd", [], "'iscrowd' or 'ignore' is not 0 or 1"),
        ("image_id", "1", "without a valid 'image_id'"),
        ("image_id", 1.5, "without a valid 'image_id'"),
        ("image_id", True, "without a valid 'image_id'"),
        ("category_id", math.nan, "without a valid 'category_id'"),
    ],
)
def test_other_fields_that_cannot_be_meant_are_refused(case, key, value, words):
    case.set(key, value)
    for use in (case.trained, lambda: build_coco_evaluator(str(case.write()))):
        with pytest.raises(DatasetError, match=rf"annotations.json: 1 x annotation .*annotation 1 \({key}") as error:
            use()
        assert words in str(error.value)


@pytest.mark.parametrize("part", ["evaluator", "test.dataset", "train.dataset"])
def test_the_configuration_says_whether_masks_are_needed(case, tiny_config, part):
    case.set("segmentation", None)
    files = [f"data.{use}.{key}" for use in ("train", "test") for key in ("annotations", "images")]
    overrides = [f"{file}={case.write() if 'annotations' in file else case.folder}" for file in files]
    overrides.append("data.num_classes=2")
    with pytest.raises(DatasetError, match="without 'segmentation', needed for masks"):
        instantiate(OmegaConf.select(load_config(tiny_config, overrides).dataloader, part))
    overrides.append("dataloader.train.mapper.use_instance_mask=False")
    instantiate(OmegaConf.select(load_config(tiny_config, overrides).dataloader, part))


def test_a_file_under_two_image_ids_is_refused(case):
    case.data["images"].append({**case.data["images"][0], "id": 4, "file_name": "./1.png"})
    for use in (case.trained, lambda: build_coco_evaluator(str(case.write()))):
        with pytest.raises(DatasetError, match=r"file under a second id .*: image 4 \(./1.png, also image 1\)"):
            use()


@pytest.mark.parametrize("box", [[10, 10, 0, 20], [10, 10, 20, -3], [10, 10, 1e-9, 20], [300, 10, 20, 20]])
def test_a_box_that_nothing_can_match_is_dropped_and_counted(case, perfect_ap, caplog, box):
    case.set("bbox", box)
    assert len(case.trained()) == 5
    assert perfect_ap(case.write(), case.folder, masks=True) == _FULL
    assert "1 boxes without usable area in the image are dropped: annotation 1 (bbox" in caplog.text


@pytest.mark.parametrize("mask", [[[-9, 1, -2, 1, -2, 9]], [[5, 5, 5, 5, 5, 5]], {"size": [80, 100], "counts": [8000]}])
def test_an_object_whose_mask_has_no_pixel_is_dropped_and_counted(case, perfect_ap, caplog, mask):
    case.set("segmentation", mask)
    assert len(case.trained(require_masks=True)) == 5 and len(case.trained()) == 6
    assert perfect_ap(case.write(), case.folder, masks=True) == _FULL
    assert "1 masks without a pixel in the image are dropped with their objects: annotation 1" in caplog.text


def test_a_file_that_is_read_again_is_warned_about_once(case, caplog):
    case.set("bbox", [10, 10, 0, 20])
    case.trained()
    case.trained()
    assert caplog.text.count("1 boxes without usable area") == 1


def test_odd_but_possible_files_are_warned_about(case, caplog):
    case.data["categories"] += [{"id": 3, "name": "dog"}, {"id": 4, "name": "bird"}]
    case.set("bbox", [-5, 10, 60, 20])
    path = str(case.write())
    build_coco_evaluator(path, output_dir=None)
    for words in (
        "2 categories share a name but are different ones: category 2 (dog), category 3 (dog)",
        "1 boxes reach out of the image, as no detection can: annotation 1",
        "2 of 4 categories have no object and are in no mean (their AP is NaN): category 3 (dog), category 4 (bird)",
    ):
        assert words in caplog.text
    caplog.clear()
    assert len(get_coco_dicts(path, str(case.folder))) == 3
    assert "2 of 4 categories have no object and are never learned: category 3 (dog), category 4 (bird)" in caplog.text


def test_categories_of_one_name_have_metrics_of_their_own(case):
    case.data["categories"] += [{"id": 3, "name": "dog"}, {"id": 4, "name": "bird"}]
    evaluator = build_coco_evaluator(str(case.write()), output_dir=None)
    evaluator.reset()
    found = Instances((80, 100), pred_boxes=Boxes(torch.ones(1, 4)), scores=torch.ones(1))
    found.pred_classes = torch.zeros(1, dtype=torch.int64)
    evaluator.process([{"image_id": 1}], [{"instances": found}])
    metrics = evaluator.evaluate()["bbox"]
    assert metrics["AP-dog (id 2)"] == 0 and math.isnan(metrics["AP-dog (id 3)"]) and math.isnan(metrics["AP-bird"])


@pytest.mark.parametrize(("start", "encoding"), [(_BOM, "utf-8"), (b"", "utf-16")])
def test_a_byte_order_mark_is_read(case, perfect_ap, start, encoding):
    path = case.write(start, encoding)
    assert len(get_coco_dicts(str(path), str(case.folder))) == 3
    assert perfect_ap(path, case.folder, masks=True) == _FULL


@pytest.mark.parametrize("value", [None, {}, "x"])
def test_annotations_that_are_no_list_are_refused(case, value):
    case.data["annotations"] = value
    with pytest.raises(DatasetError, match="expected a list under 'annotations'"):
        build_coco_evaluator(str(case.write()))


def test_a_test_set_may_have_no_annotations(case):
    del case.data["annotations"]
    evaluator = build_coco_evaluator(str(case.write()))
    evaluator.reset()
    assert evaluator.evaluate() == {}
