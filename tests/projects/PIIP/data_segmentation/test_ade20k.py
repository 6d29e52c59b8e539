"""Unpacking and checking ADE20K, with three images instead of twenty-two thousand."""

from __future__ import annotations

import json
import zipfile

import numpy as np
import pytest

pytest.importorskip("detectron2")

from PIL import Image

from piip.data import DatasetError
from piip.data.audit import Audit
from piip.data.segmentation.ade20k import FOLDER, Split, audit_ade20k, prepare_ade20k
from piip.data.segmentation.audit import audit_label_maps
from piip.data.segmentation.classes import label_classes
from piip_core.archives import ArchiveError

SPLITS = (Split("training", 2), Split("validation", 1))


@pytest.fixture
def root(tmp_path):
    """A folder with the archive as it is downloaded."""
    rng, source, root = np.random.default_rng(0), tmp_path / "source", tmp_path / "data"
    root.mkdir()
    for split in SPLITS:
        for folder in split.folders(source / FOLDER):
            (source / folder).mkdir(parents=True)
        for index in range(1, split.images + 1):
            images, labels = split.folders(source / FOLDER)
            Image.fromarray(rng.integers(0, 256, (9, 12, 3), dtype=np.uint8)).save(f"{images}/ADE_{index:08d}.jpg")
            values = rng.integers(0, 151, (9, 12), dtype=np.uint8)
            Image.fromarray(values).save(f"{labels}/ADE_{index:08d}.png")
    (source / FOLDER / "objectInfo150.txt").write_text("x")
    with zipfile.ZipFile(root / f"{FOLDER}.zip", "w") as archive:
        for path in sorted(source.rglob("*")):
            archive.write(path, path.relative_to(source))
    return root


def _prepare(root, **kwargs):
    return prepare_ade20k(root, splits=SPLITS, **kwargs)


def _audit(root):
    return audit_ade20k(root, splits=SPLITS)


def test_the_archive_becomes_a_data_set_without_problems(root):
    assert _prepare(root).written == 7
    assert (root / FOLDER / "annotations" / "validation" / "ADE_00000001.png").is_file()
    assert _prepare(root) is None  # nothing to be done
    found = _audit(root)
    assert found.ok and [part.details["pairs"] for part in found.sets] == [2, 1]
    for part in found.sets:
        values = [np.asarray(Image.open(path)) for path in (root / FOLDER / "annotations" / part.title).iterdir()]
        whole = np.concatenate(values, axis=None)
        assert part.details["ignored"] == pytest.approx((whole == 0).mean())
        assert part.columns["classes seen"] == f"{len(set(whole.tolist()) - {0})} of 150"


def test_an_interrupted_or_damaged_folder_is_completed(root):
    _prepare(root)
    (root / FOLDER / "images" / "training" / "ADE_00000002.jpg").unlink()
    done = _prepare(root)
    assert (done.written, done.present) == (1, 6)


def test_archives_that_are_not_the_data_set_are_refused(root, tmp_path):
    with pytest.raises(DatasetError, match=r"other.zip: no such file. Download http://.*--download"):
        _prepare(root, archive=tmp_path / "other.zip")
    with zipfile.ZipFile(tmp_path / "other.zip", "w") as archive:
        archive.writestr(f"{FOLDER}/images/training/1.jpg", b"x")
    with pytest.raises(DatasetError, match=r"other.zip: 1 files in ADE.*images/training: expected the published 2"):
        _prepare(root, archive=tmp_path / "other.zip")
    whole = root / f"{FOLDER}.zip"
    whole.write_bytes(whole.read_bytes()[:-30])
    with pytest.raises(ArchiveError, match="not a complete zip archive"):
        _prepare(root)
    assert [path.name for path in root.iterdir()] == [whole.name]


def test_everything_wrong_is_reported(root, tmp_path):
    _prepare(root)
    images, labels = ((root / FOLDER / kind / "training") for kind in ("images", "annotations"))
    cut = images / "ADE_00000001.jpg"
    cut.write_bytes(cut.read_bytes()[:-200])
    Image.fromarray(np.full((9, 12), 151, dtype=np.uint8)).save(labels / "ADE_00000001.png")
    Image.fromarray(np.full((8, 12), 150, dtype=np.uint8)).save(labels / "ADE_00000002.png")
    Image.new("RGB", (12, 9)).save(images / "more.jpg")
    (root / FOLDER / "annotations" / "validation" / "ADE_00000001.png").unlink()
    found = _audit(root)
    assert not found.ok
    problems = [(kind, path.rpartition("/")[2]) for kind, path, _ in found.sets[0].problems]
    assert problems == [
        ("image without label map", "more.jpg"),
        ("image unreadable", "ADE_00000001.jpg"),
        ("label map unusable", "ADE_00000001.png"),
        ("sizes differ", "ADE_00000002.png"),
    ]
    assert [kind for kind, _, _ in found.sets[1].problems] == ["folders unusable"]
    text = found.summary(examples=1)
    assert "label 151 (108 pixels): expected 1 to 150" in text
    assert "8 x 12 (height x width), but its image is 9 x 12" in text
    assert "annotations/validation: no labels" in text
    found.write_json(tmp_path / "report.json")
    report = json.loads((tmp_path / "report.json").read_text())
    assert [len(part["problems"]) for part in report["sets"]] == [4, 1]
    assert report["sets"][0]["pixels"][149] == 8 * 12


def test_another_number_of_images_is_a_problem(shared_files):
    classes = label_classes(str(shared_files.classes))
    found = audit_label_maps(str(shared_files.images), str(shared_files.labels), classes, expected=7, workers=2)
    assert [kind for kind, _, _ in found.problems] == ["number of images"] and not found.warning
    assert "6 images with a label map: expected 7" in Audit([found]).summary()
