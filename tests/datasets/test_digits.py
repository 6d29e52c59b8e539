"""The digit scenes: what is drawn is what is annotated, and the splits share nothing."""

import json

import numpy as np
import pytest
from PIL import Image
from pycocotools.coco import COCO
from scipy.ndimage import binary_erosion
from sklearn.datasets import load_digits

from piip_core.errors import UserError
from piip_digits import data_sets as digit_dataset
from piip_digits import scenes as digit_scenes
from piip_digits.scenes import NAMED_COLOURS, SceneConfig, digit_crops, render_scene, scenes


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("data") / "digits"
    assert digit_dataset.prepare_digits(root, num_train=24, num_val=12)
    return root


@pytest.fixture(scope="module")
def cocos(root):
    return {split: COCO(str(root / "annotations" / f"instances_{split}.json")) for split in ("train", "val")}


def test_scenes_are_reproducible_and_independent_of_their_number():
    first = list(scenes(SceneConfig(), "train", 3))
    again = render_scene(SceneConfig(), "train", 2)
    assert np.array_equal(first[2].image, again.image)
    assert [digit.sample for digit in first[2].digits] == [digit.sample for digit in again.digits]
    other = render_scene(SceneConfig(seed=1), "train", 2)
    assert not np.array_equal(other.image, again.image)


def test_each_mask_is_a_coloured_digit_in_a_dark_outline_and_none_overlap():
    for scene in scenes(SceneConfig(max_digits=8), "val", 12):
        assert 1 <= len(scene.digits) <= 8
        assert sum(digit.mask.astype(int) for digit in scene.digits).max() == 1
        topmost = scene.digits[-1].mask
        rim = topmost & ~binary_erosion(topmost, iterations=1)
        colours = scene.image[binary_erosion(topmost, iterations=3)].astype(int)
        assert scene.image[rim].max(axis=-1).mean() < 120
        assert np.median(colours.max(axis=-1)) > 150
        # One paint: the brightest pixels inside have one colour
        bright = colours[colours.sum(axis=-1) > np.median(colours.sum(axis=-1)) - 20]
        assert (np.abs(bright - np.median(bright, axis=0)).max(axis=-1) <= 12).mean() > 0.7


def test_hiding_less_than_allowed():
    free, crowded = (
        SceneConfig(min_digits=12, max_digits=12, min_visible=1.0),
        SceneConfig(min_digits=12, max_digits=12, min_visible=0.1),
    )
    whole = [digit for scene in scenes(free, "train", 6) for digit in scene.digits]
    partly = [digit for scene in scenes(crowded, "train", 6) for digit in scene.digits]
    # Scenes where nothing may be hidden have room for fewer digits.
    assert len(whole) < len(partly) == 72


def test_split_of_digits_and_photographs_is_disjoint(cocos):
    assert len(np.unique(load_digits().data, axis=0)) == len(load_digits().data)  # no sample occurs twice
    samples = {split: {entry["sample"] for entry in coco.anns.values()} for split, coco in cocos.items()}
    photos = {split: {entry["photo"] for entry in coco.imgs.values()} for split, coco in cocos.items()}
    assert samples["train"] and samples["val"] and not samples["train"] & samples["val"]
    assert photos["train"] and photos["val"] and not photos["train"] & photos["val"]
    members = {split: digit_scenes.split_samples(split) for split in ("train", "val")}
    assert sorted(np.concatenate(list(members.values()))) == list(range(len(load_digits().target)))
    for split, indices in members.items():
        share = np.bincount(load_digits().target[indices]) / np.bincount(load_digits().target)
        assert np.allclose(share, 0.75 if split == "train" else 0.25, atol=0.01)


@pytest.mark.parametrize("split", ["train", "val"])
def test_annotations_are_valid_coco(root, cocos, split):
    coco, target = cocos[split], load_digits().target
    assert len(coco.imgs) == {"train": 24, "val": 12}[split]
    assert [category["name"] for category in coco.loadCats(coco.getCatIds())] == [str(i) for i in range(10)]
    for image in coco.imgs.values():
        with Image.open(root / split / image["file_name"]) as picture:
            assert picture.size == (image["width"], image["height"]) and picture.mode == "RGB"
    for entry in coco.anns.values():
        mask = coco.annToMask(entry)
        assert mask.sum() == entry["area"] > 0
        rows, columns = np.nonzero(mask)
        box = [columns.min(), rows.min(), np.ptp(columns) + 1, np.ptp(rows) + 1]
        assert entry["bbox"] == box
        assert coco.cats[entry["category_id"]]["name"] == str(target[entry["sample"]])


@pytest.mark.parametrize("split", ["train", "val"])
def test_label_maps_say_what_the_masks_say(root, cocos, split):
    coco = cocos[split]
    names = (root / "labels" / "names.txt").read_text().splitlines()
    assert len(list((root / "labels" / split).iterdir())) == len(coco.imgs)
    for image in coco.imgs.values():
        with Image.open(root / "labels" / split / image["file_name"].replace(".jpg", ".png")) as picture:
            labels = np.asarray(picture)
        assert labels.dtype == np.uint8 and labels.shape == (image["height"], image["width"])
        uncovered = np.ones(labels.shape, dtype=bool)
        for entry in coco.imgToAnns[image["id"]]:
            mask = coco.annToMask(entry).astype(bool)
            assert {names[value] for value in np.unique(labels[mask])} == {coco.cats[entry["category_id"]]["name"]}
            uncovered &= ~mask
        assert {names[value] for value in np.unique(labels[uncovered])} == {"background"}


def test_a_complete_data_set_is_kept_and_another_replaced(tmp_path):
    root = tmp_path / "digits"
    assert digit_dataset.prepare_digits(root, num_train=2, num_val=1)
    before = (root / "manifest.json").stat().st_mtime_ns
    assert not digit_dataset.prepare_digits(root, num_train=2, num_val=1)
    assert (root / "manifest.json").stat().st_mtime_ns == before
    assert digit_dataset.prepare_digits(root, num_train=3, num_val=1)
    assert len(list((root / "train").iterdir())) == 3
    assert [path.name for path in tmp_path.iterdir()] == ["digits"]


def test_an_interrupted_build_leaves_the_old_data_set(tmp_path, monkeypatch):
    root = tmp_path / "digits"
    digit_dataset.prepare_digits(root, num_train=2, num_val=1)

    def fail(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(digit_dataset, "_annotations", fail)
    with pytest.raises(KeyboardInterrupt):
        digit_dataset.prepare_digits(root, num_train=3, num_val=1)
    assert [path.name for path in tmp_path.iterdir()] == ["digits"]
    assert len(json.loads((root / "annotations" / "instances_train.json").read_text())["images"]) == 2


def test_foreign_folders_are_not_touched(tmp_path):
    for name, text in (("mine.txt", "keep"), ("manifest.json", "[{}]"), ("manifest.json", "{")):
        (tmp_path / name).write_text(text)
        with pytest.raises(UserError, match="not a digit data set"):
            digit_dataset.prepare_digits(tmp_path, num_train=1, num_val=1)
        assert (tmp_path / name).read_text() == text


def test_bad_parameters_are_named():
    with pytest.raises(ValueError, match="max_digit_size=84: expected at most 42 for image_size=64"):
        SceneConfig(image_size=64)
    with pytest.raises(ValueError, match="max_digits=11: expected at most 10"):
        SceneConfig(max_digits=11, all_different=True)
    with pytest.raises(ValueError, match="max_digits=7: expected at most 6"):
        SceneConfig(max_digits=7, palette=NAMED_COLOURS)
    with pytest.raises(ValueError, match="split='test'"):
        render_scene(SceneConfig(), "test", 0)
    with pytest.raises(ValueError, match="num_val=0"):
        digit_dataset.prepare_digits("unused", num_val=0)


def test_palette_colours_are_those_seen():
    paints = dict(NAMED_COLOURS)
    seen = set()
    for scene in scenes(SceneConfig(palette=NAMED_COLOURS, min_visible=1.0), "val", 12):
        names = [digit.colour for digit in scene.digits]
        assert len(set(names)) == len(names)
        for digit in scene.digits:
            core = scene.image[binary_erosion(digit.mask, iterations=3)] / 255
            assert np.abs(np.median(core, axis=0) - paints[digit.colour]).max() < 0.1
        seen.update(names)
    assert seen == set(paints)


def test_digits_that_are_all_different_and_off_the_middle_lines():
    config = SceneConfig(min_digits=4, max_digits=8, max_digit_size=48, all_different=True, middle_margin=0.1)
    for scene in scenes(config, "train", 20):
        labels = [digit.label for digit in scene.digits]
        assert len(set(labels)) == len(labels) >= 2
        topmost = scene.digits[-1]
        x, y, width, height = topmost.box
        assert min(abs(x + width / 2 - 96), abs(y + height / 2 - 96)) > 0.1 * 192 - 2
    repeated = [[digit.label for digit in scene.digits] for scene in scenes(SceneConfig(), "train", 20)]
    assert any(len(set(labels)) < len(labels) for labels in repeated)


def test_crops_show_one_digit_each():
    images, labels = digit_crops("val", 40, size=48)
    assert images.shape == (40, 48, 48, 3) and images.dtype == np.uint8
    assert labels.dtype == np.int64 and set(labels) <= set(range(10)) and len(set(labels)) > 5
    again, _ = digit_crops("val", 40, size=48)
    assert np.array_equal(images, again)
