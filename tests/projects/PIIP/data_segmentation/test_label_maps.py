"""Classes and label maps: what a value stands for, and what is refused in which words."""

from __future__ import annotations

import re

import numpy as np
import pytest

pytest.importorskip("detectron2")

from PIL import Image

from piip.data import DatasetError
from piip.data.label_maps import LabelClasses, label_classes, read_label_map


def _save(path, values, mode=None):
    Image.fromarray(values).save(path)
    return str(path)


def test_ade20k_s_own_files_start_at_one(tmp_path):
    classes = label_classes("ade20k")
    assert classes.num_classes == 150
    assert classes.names[:3] == ("wall", "building", "sky") and classes.names[149] == "flag"
    assert [(c.id, c.name) for c in classes.categories[::149]] == [(1, "wall"), (150, "flag")]
    path = _save(tmp_path / "a.png", np.array([[0, 1, 2], [149, 150, 255]], dtype=np.uint8))
    assert read_label_map(path, classes).tolist() == [[255, 0, 1], [148, 149, 255]]
    converted = label_classes("ade20k", reduce_zero_label=False)  # Detectron2's layout
    path = _save(tmp_path / "b.png", np.array([[255, 0, 1], [148, 149, 255]], dtype=np.uint8))
    assert read_label_map(path, converted).tolist() == [[255, 0, 1], [148, 149, 255]]


@pytest.mark.parametrize("given", ["file", "list", "number"])
def test_own_classes_start_at_zero(tmp_path, given):
    (tmp_path / "names.txt").write_text("\ufeffroad\r\nnot a road\r\n\r\n", encoding="utf-8")
    names = {"file": str(tmp_path / "names.txt"), "list": ["road", "not a road"], "number": 2}[given]
    classes = label_classes(names)
    assert classes.names == (("class 0", "class 1") if given == "number" else ("road", "not a road"))
    assert [c.id for c in classes.categories] == [0, 1]
    path = _save(tmp_path / "a.png", np.array([[0, 1, 255]], dtype=np.uint8))
    assert read_label_map(path, classes).tolist() == [[0, 1, 255]]
    shifted = label_classes(names, reduce_zero_label=True)
    assert [c.id for c in shifted.categories] == [1, 2]
    assert read_label_map(path, shifted).tolist() == [[255, 0, 255]]


@pytest.mark.parametrize(
    ("classes", "words"),
    [
        ("nowhere.txt", r"data.classes=nowhere.txt: no such file .*'ade20k', the path of a text file"),
        (0, "0 classes: expected 1 to 255"),
        (256, "256 classes: expected 1 to 255"),
        (["a", "b", "a"], r"used more than once: \['a'\]"),
        (["a", ""], "class 1 has an empty name"),
        (True, "data.classes=True: expected"),
        (1.5, "data.classes=1.5: expected"),
    ],
)
def test_classes_that_cannot_be_meant(classes, words):
    with pytest.raises(DatasetError, match=words):
        label_classes(classes)


def test_a_broken_list_of_names_is_named(tmp_path):
    for content, words in ((b"a\n\nb\n", "class 1 has an empty name"), (b"", "0 classes"), (b"\xff\xfe\x00", "UTF-8")):
        (tmp_path / "names.txt").write_bytes(content)
        with pytest.raises(DatasetError, match=f"{re.escape(str(tmp_path))}/names.txt: .*{words}"):
            label_classes(str(tmp_path / "names.txt"))


@pytest.mark.parametrize("kind", ["8 bits", "16 bits", "palette", "1 bit"])
def test_every_kind_of_one_channel_png_gives_its_numbers(tmp_path, kind):
    values = np.random.default_rng(0).integers(0, 2 if kind == "1 bit" else 7, (20, 31), dtype=np.uint8)
    image = Image.fromarray(values)
    if kind == "16 bits":
        image = Image.fromarray(values.astype(np.uint16))
    elif kind == "1 bit":
        image = Image.fromarray(values.astype(bool))
    elif kind == "palette":  # as of Pascal VOC: the colours mean nothing
        image.putpalette([255 - k for k in range(256) for _ in range(3)])
    image.save(tmp_path / "a.png")
    with Image.open(tmp_path / "a.png") as saved:
        assert saved.mode == {"8 bits": "L", "16 bits": "I;16", "palette": "P", "1 bit": "1"}[kind]
    labels = read_label_map(str(tmp_path / "a.png"), label_classes(7))
    assert labels.dtype == np.uint8 and np.array_equal(labels, values)


@pytest.mark.parametrize(
    ("values", "reduce_zero_label", "words"),
    [
        ([0, 3, 3], False, r"label 3 \(2 pixels\): expected 0 to 2 for the classes, 255 to ignore"),
        ([0, 3, 4, 4], True, r"label 4 \(2 pixels\): expected 1 to 3 .* 0 or 255 to ignore"),
        ([0, 300, 65535], False, r"label 300 \(1 pixels\), 65535 \(1 pixels\)"),
        ([9, 10, 11, 12], False, r"11 \(1 pixels\) and 1 more"),
    ],
)
def test_a_value_that_stands_for_nothing_is_named(tmp_path, values, reduce_zero_label, words):
    path = _save(tmp_path / "a.png", np.array([values], dtype=np.uint8 if max(values) < 256 else np.uint16))
    with pytest.raises(DatasetError, match=f"a.png: .*{words}"):
        read_label_map(path, LabelClasses(("a", "b", "c"), reduce_zero_label))


def test_pictures_and_lossy_files_are_refused(tmp_path):
    path = _save(tmp_path / "a.png", np.zeros((4, 5, 3), dtype=np.uint8))
    with pytest.raises(DatasetError, match=r"a.png: an image of mode RGB \(3 channels\): expected one channel"):
        read_label_map(path, label_classes(3))
    Image.fromarray(np.zeros((4, 5), dtype=np.uint8)).save(tmp_path / "b.png", format="JPEG")
    with pytest.raises(DatasetError, match=r"b.png: is a JPEG file: expected PNG"):
        read_label_map(str(tmp_path / "b.png"), label_classes(3))
