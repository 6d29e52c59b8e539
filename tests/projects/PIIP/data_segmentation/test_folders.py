"""Folders of images and label maps: which belong together, and what is refused in which words."""

from __future__ import annotations

import logging
import shutil
import unicodedata

import numpy as np
import pytest

pytest.importorskip("detectron2")

from PIL import Image

from piip.data import DatasetError, UnreadableImageError
from piip.data.segmentation import SemSegDatasetMapper, find_pairs, get_sem_seg_dicts
from piip_core.images import ImageTooLargeError


def _load(files, **kwargs):
    return get_sem_seg_dicts(str(files.images), str(files.labels), classes=str(files.classes), **kwargs)


def test_records_are_detectron2_s(files):
    records = _load(files, num_classes=3)
    assert [r["image_id"] for r in records] == ["1", "2", "3", "4", "5", "6"]
    assert records[0] == {
        "file_name": str(files.images / "1.png"),
        "sem_seg_file_name": str(files.labels / "1.png"),
        "image_id": "1",
        "height": 40,
        "width": 56,
    }


def test_subfolders_and_other_endings_count_and_hidden_files_do_not(files, caplog):
    for folder in (files.images, files.labels):
        (folder / "town").mkdir()
        (folder / "._1.png").write_bytes(b"x")
        (folder / ".ipynb_checkpoints").mkdir()
        (folder / ".ipynb_checkpoints" / "1-checkpoint.png").write_bytes(b"x")
    Image.new("RGB", (20, 10)).save(files.images / "town" / "1.JPEG")
    Image.new("L", (20, 10)).save(files.labels / "town" / "1.png")
    (files.images / "notes.txt").write_text("mine")
    shutil.copy(files.labels / "1.png", files.labels / "left over.png")
    with caplog.at_level(logging.WARNING, logger="piip"):
        records = _load(files)
    assert [r["image_id"] for r in records] == ["1", "2", "3", "4", "5", "6", "town/1"]
    assert records[-1]["file_name"] == str(files.images / "town" / "1.JPEG")
    messages = "\n".join(record.getMessage() for record in caplog.records)
    assert "1 files do not end as images and are left out: " in messages and "notes.txt" in messages
    assert "1 label maps without an image" in messages and "left over.png" in messages


def test_sizes_are_compared_as_the_image_is_seen(files):
    turned = Image.new("RGB", (40, 30))
    exif = turned.getexif()
    exif[274] = 6  # a quarter turn
    turned.save(files.images / "7.jpg", exif=exif)
    Image.new("L", (30, 40)).save(files.labels / "7.png")
    assert _load(files)[-1]["height"] == 40
    Image.new("L", (40, 30)).save(files.labels / "7.png")
    with pytest.raises(
        DatasetError, match=r"1 label maps have another size .*7.png is \(30, 40\), its image \(40, 30\)"
    ):
        _load(files)


def test_what_is_missing_is_named(files):
    (files.labels / "2.png").unlink()
    (files.labels / "5.png").unlink()
    with pytest.raises(DatasetError, match=r"labels: 2 images have no label map .*images/2.png, .*images/5.png"):
        _load(files)


def test_two_images_of_one_name_are_refused(files):
    Image.new("RGB", (56, 40)).save(files.images / "1.jpg")
    with pytest.raises(
        DatasetError, match=r"1 names of several images or label maps, which differ in the ending .*: 1$"
    ):
        _load(files)


def test_wrong_folders_say_which_and_what_was_expected(files, tmp_path):
    labels = str(files.labels)
    with pytest.raises(
        DatasetError, match=r"/nowhere: no such folder .*expected a folder of images. Set data.train.images"
    ):
        find_pairs("/nowhere", labels)
    with pytest.raises(DatasetError, match=r"/nowhere: no such folder .*data.test.labels"):
        find_pairs(str(files.images), "/nowhere")
    with pytest.raises(DatasetError, match=r"names.txt: is a file"):
        find_pairs(str(files.classes), labels)
    with pytest.raises(DatasetError, match="images and label maps are in the same folder"):
        find_pairs(labels, labels)
    (tmp_path / "other").mkdir()
    with pytest.raises(DatasetError, match=r"other: no labels: expected files that end in .png$"):
        find_pairs(str(files.images), str(tmp_path / "other"))
    (tmp_path / "other" / "1.txt").write_text("x")
    with pytest.raises(DatasetError, match=r"other: no labels: .*there are 1 other files, such as .*1.txt"):
        find_pairs(str(files.images), str(tmp_path / "other"))


def test_broken_headers_are_named_before_training(files):
    Image.fromarray(np.zeros((40, 56, 3), dtype=np.uint8)).save(files.labels / "1.png")
    with pytest.raises(DatasetError, match=r"labels/1.png: an image of mode RGB"):
        _load(files)
    (files.labels / "1.png").write_bytes(b"")
    with pytest.raises(UnreadableImageError, match=r"labels/1.png: the file is empty"):
        _load(files)


def test_another_number_of_classes_is_an_error(files):
    with pytest.raises(DatasetError, match=r"3 classes, but .* data.num_classes=150. Set data.num_classes=3"):
        _load(files, num_classes=150)


def test_names_that_look_alike_belong_together(files):
    composed, apart = (unicodedata.normalize(form, "Zürich") for form in ("NFC", "NFD"))
    (files.labels / "town").mkdir()
    Image.new("RGB", (20, 10)).save(files.images / f"{composed}.JPG")
    Image.new("L", (20, 10)).save(files.labels / f"{apart}.PNG")
    Image.new("RGB", (20, 10)).save(files.images / "town\\1.webp")  # as some programs unpack archives of Windows
    Image.new("L", (20, 10)).save(files.labels / "town" / "1.png")
    records = {record["image_id"]: record for record in _load(files)}
    assert records[composed]["sem_seg_file_name"] == str(files.labels / f"{apart}.PNG")
    assert records["town/1"]["file_name"] == str(files.images / "town\\1.webp")
    shutil.copy(files.images / f"{composed}.JPG", files.images / f"{apart}.jpg")
    shutil.copy(files.labels / "town" / "1.png", files.labels / "town\\1.png")
    with pytest.raises(DatasetError, match=f"2 names of several images or label maps, .*: {composed}, town/1"):
        _load(files)


def test_links_that_go_round_are_followed_once(files, tmp_path, caplog):
    for folder in (files.images, files.labels):
        (tmp_path / f"more {folder.name}").mkdir()
        (folder / "more").symlink_to(tmp_path / f"more {folder.name}")
        (folder / "round").symlink_to(folder)
        (folder / "more" / "up").symlink_to(folder.parent)
    shutil.copy(files.images / "1.png", files.images / "more")
    shutil.copy(files.labels / "1.png", files.labels / "more")
    assert [r["image_id"] for r in _load(files)] == ["1", "2", "3", "4", "5", "6", "more/1"]
    assert caplog.text.count("is a link to a folder that it lies in, and is not followed") == 4


def test_image_and_labels_are_turned_alike(files):
    """As in a folder of scans: both have the tag, or the image alone and the labels are drawn on what it shows."""
    rng = np.random.default_rng(0)
    shown, labels = rng.integers(0, 256, (5, 9, 3), dtype=np.uint8), rng.integers(0, 3, (5, 9), dtype=np.uint8)
    exif = Image.Exif()
    exif[274] = 6
    for name, options in (("7", {}), ("8", {"exif": exif})):
        Image.fromarray(np.rot90(shown).copy()).save(files.images / f"{name}.tif", exif=exif)
        Image.fromarray(np.rot90(labels).copy() if options else labels).save(files.labels / f"{name}.png", **options)
    mapper = SemSegDatasetMapper(True, classes=3, augmentations=[])
    for record in _load(files)[6:]:
        sample = mapper(record)
        assert (record["height"], record["width"]) == (5, 9)
        assert np.array_equal(sample["image"].permute(1, 2, 0), shown) and np.array_equal(sample["sem_seg"], labels)


def test_huge_images_and_animated_labels_are_refused(files, monkeypatch):
    frames = [Image.new("L", (56, 40), value) for value in (0, 1)]
    frames[0].save(files.labels / "1.png", save_all=True, append_images=frames[1:])
    with pytest.raises(DatasetError, match=r"labels/1.png: is an animation of 2 images"):
        _load(files)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(ImageTooLargeError, match=r"images/1.png: .*2240 pixels.*limit of 2000"):
        _load(files)


def test_a_class_that_never_occurs_is_warned_about(files, caplog, monkeypatch):
    assert _load(files) and not caplog.text
    files.classes.write_text("ground\ndisc\nbar\nball\n")
    _load(files)
    assert "labels: class 'ball' occurs in no label map (all 6 were looked at)" in caplog.text
    monkeypatch.setattr("piip.data.segmentation._LOOKED_AT", 4)
    _load(files)
    assert "class 'ball' occurs in no label map (4 of 6 were looked at)" in caplog.text
    for path in files.labels.iterdir():
        with Image.open(path) as image:
            Image.fromarray(np.asarray(image) // 255 * 255).save(path)
    _load(files)
    words = "3 of 4 classes occur in no label map: 'disc', 'bar', 'ball'; 255 = ignored: masks of 0 and 255?"
    assert words in caplog.text


def test_a_wrong_label_is_found_before_training(files):
    Image.fromarray(np.full((40, 56), 9, dtype=np.uint8)).save(files.labels / "3.png")
    files.classes.write_text("ground\ndisc\nbar\nball\n")  # one that is looked for in all files
    with pytest.raises(DatasetError, match=r"labels/3.png: label 9 \(2240 pixels\)"):
        _load(files)
