"""COCO-format data sets: what is loaded, what is refused and in which words."""

from __future__ import annotations

import logging
import re
from pathlib import Path

import pytest

pytest.importorskip("detectron2")

from detectron2.config import instantiate

from piip.data import DatasetError, coco_categories, get_coco_dicts
from piip.lazy_config import follow_annotations, load_config


def _load(files, **kwargs):
    return get_coco_dicts(str(files.annotations), str(files.images), **kwargs)


def test_category_ids_become_contiguous_in_id_order(coco):
    assert [c.name for c in coco_categories(str(coco.annotations))] == ["square", "bar", "disc"]
    data = coco.read()
    expected = {a["id"]: [3, 17, 40].index(a["category_id"]) for a in data["annotations"]}
    loaded = [a["category_id"] for record in _load(coco, require_masks=True) for a in record["annotations"]]
    assert loaded == [expected[a["id"]] for a in data["annotations"]]


def _set(kind, index, key, value=None):
    """Gives an entry another value, or takes it away."""

    def damage(data):
        data[kind][index].pop(key)
        if value is not None:
            data[kind][index][key] = value

    return damage


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (_set("annotations", 1, "category_id", 5), ["1 x annotation of a category", "annotation 2 (category_id 5)"]),
        (_set("annotations", 2, "image_id", 77), ["1 x annotation of an image", "annotation 3 (image_id 77)"]),
        (_set("annotations", 0, "bbox", [1, 2, 3]), ["four finite numbers", "annotation 1 (bbox [1, 2, 3])"]),
        (_set("categories", 1, "id", 40), ["category id used more than once: category 40"]),
        (lambda data: data["annotations"][3].update(ignore=1), ["'ignore'", "annotation 4"]),
        (_set("annotations", 4, "category_id"), ["without a valid 'category_id'", "annotation 5"]),
        (_set("annotations", 5, "segmentation"), ["without 'segmentation'", "annotation 6"]),
        (_set("images", 0, "width", "160"), ["image without a valid 'width'", "image 1 (width: '160')"]),
        (_set("images", 0, "height", 0), ["image with a side below 1 pixel", "image 1"]),
        (_set("images", 1, "id", 1), ["image id used more than once: image 1"]),
        (_set("images", 1, "file_name", "gone.png"), ["1 x image that is not in", "image 2 (gone.png)"]),
        (_set("images", 1, "file_name", "../../secret.png"), ["points out of", "image 2 (../../secret.png)"]),
        (_set("categories", 0, "name"), ["category without a valid 'name'", "category 40"]),
        (lambda data: data.update(images=[]), ["list 'images' is empty"]),
        (lambda data: data.pop("categories"), ["expected a list under 'categories'"]),
        (lambda data: data["images"].append("x"), ["image number 6 is 'x'", "expected a JSON object"]),
    ],
)
def test_a_broken_entry_is_named_with_its_file(coco, damage, words):
    data = coco.read()
    damage(data)
    coco.write(data)
    with pytest.raises(DatasetError) as error:
        _load(coco, require_masks=True)
    for part in [str(coco.annotations), *words]:
        assert part in str(error.value)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("", r"the file is empty \(0 bytes\)"),
        ('{"images": [', "not valid JSON .*cut off"),
        ("[]", "holds a JSON list.*a list of results is not a data set"),
    ],
)
def test_a_broken_file_is_named(coco, content, words):
    coco.annotations.write_text(content)
    with pytest.raises(DatasetError, match=f"{re.escape(str(coco.annotations))}: {words}"):
        _load(coco)


def test_wrong_paths_say_which_and_what_was_expected(coco):
    with pytest.raises(DatasetError, match=r"/nowhere.json: no such file .*data.train.annotations"):
        get_coco_dicts("/nowhere.json", str(coco.images))
    with pytest.raises(DatasetError, match=r"is a folder: expected a COCO-format annotation file"):
        get_coco_dicts(str(coco.images), str(coco.images))
    with pytest.raises(DatasetError, match=r"/nowhere: no such folder .*data.train.images"):
        get_coco_dicts(str(coco.annotations), "/nowhere")
    with pytest.raises(DatasetError, match=r"is a file .*: expected the folder with the images"):
        get_coco_dicts(str(coco.annotations), str(coco.annotations))


def test_many_problems_are_counted_and_the_first_ones_named(coco):
    data = coco.read()
    for annotation in data["annotations"]:
        annotation["category_id"] = 5
    coco.write(data)
    with pytest.raises(DatasetError, match=r"18 x annotation of a category .* and 15 more"):
        _load(coco)


@pytest.mark.parametrize(
    ("written", "stored"),
    [("caf\u00e9.png", "cafe\u0301.png"), ("cafe\u0301.png", "caf\u00e9.png"), ("below\\x.png", "below/x.png")],
)
def test_a_name_that_looks_like_that_of_a_file_finds_it(coco, written, stored):
    data = coco.read()
    first = coco.images / data["images"][0]["file_name"]
    (coco.images / stored).parent.mkdir(exist_ok=True)
    first.rename(coco.images / stored)
    data["images"][0]["file_name"] = written
    coco.write(data)
    (found,) = [record for record in _load(coco) if record["image_id"] == data["images"][0]["id"]]
    assert Path(found["file_name"]).samefile(coco.images / stored)


def test_boxes_outside_the_image_are_dropped_or_clipped_with_one_warning(coco, caplog):
    data = coco.read()
    first = data["images"][0]
    boxes = [[-10, 5, 40, 40], [first["width"] + 5, 5, 10, 10], [5, 5, 0, 20], [5, 5, 20, 20]]
    data["annotations"] = [
        {**data["annotations"][0], "id": i + 1, "bbox": box, "area": box[2] * box[3]} for i, box in enumerate(boxes)
    ]
    coco.write(data)
    with caplog.at_level(logging.WARNING, logger="piip"):
        records = _load(coco)
    assert len(caplog.records) == 1
    message = caplog.records[0].getMessage()
    assert str(coco.annotations) in message
    assert "2 boxes without usable area in the image are dropped: annotation 2 (bbox" in message
    assert "1 boxes reach out of the image and are clipped: annotation 1 (bbox [-10, 5, 40, 40]" in message
    assert [[a["bbox"] for a in record["annotations"]] for record in records] == [[boxes[0], boxes[3]]]


def test_the_published_training_rule_leaves_out_small_and_empty_images(coco):
    data = coco.read()
    data["images"][0]["height"] = 31
    data["annotations"] = [{**a, "iscrowd": int(a["image_id"] == 3)} for a in data["annotations"] if a["image_id"] != 2]
    coco.write(data)
    assert [r["image_id"] for r in _load(coco, min_image_side=32)] == [4, 5, 6]
    assert [r["image_id"] for r in _load(coco, filter_empty=False, drop_boxes=False)] == [1, 2, 3, 4, 5, 6]
    with pytest.raises(DatasetError, match="none of its 6 images is left"):
        _load(coco, min_image_side=1000)


def test_another_number_of_classes_is_an_error(coco):
    with pytest.raises(DatasetError, match=r"3 categories, but .* data.num_classes=80. Set data.num_classes=3"):
        _load(coco, num_classes=80)


def test_the_model_follows_the_annotation_file(coco, tiny_config):
    cfg = load_config(tiny_config, coco.overrides("train", "test"))
    assert cfg.model.roi_heads.box_predictor.num_classes == 80
    follow_annotations(cfg, training=True)
    model = instantiate(cfg.model)
    assert model.roi_heads.box_predictor.cls_score.out_features == 4
    assert model.roi_heads.mask_head.predictor.out_channels == 3
    assert len(instantiate(cfg.dataloader.train.dataset)) == 6


def test_training_and_test_set_must_have_the_same_classes(coco, tmp_path, tiny_config):
    data = coco.read()
    data["categories"][0]["name"] = "ring"
    other = tmp_path / "other.json"
    other.write_text(coco.annotations.read_text().replace('"disc"', '"ring"'))
    cfg = load_config(tiny_config, [*coco.overrides("train", "test"), f"data.test.annotations={other}"])
    with pytest.raises(DatasetError, match=r"different categories: only the first .*ring.*only the second .*disc"):
        follow_annotations(cfg, training=True)
