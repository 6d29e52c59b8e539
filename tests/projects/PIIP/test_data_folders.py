"""Folders as people have them: every form is recognised, holds the same objects, and says what is wrong with it."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("detectron2")

from PIL import Image
from pycocotools.coco import COCO

from piip.data import DatasetError, get_coco_dicts
from piip.data.folders import OwnData, read_folder

_NAMES = ["cat", "dog"]
_SIZE = (80, 40)  # width, height
# By image name: (class, left, top, width, height) in pixels; eighths of the sides, so that every form can say them
_OBJECTS = {
    "train": {
        "a": [(0, 10, 5, 20, 10)],
        "b": [(1, 40, 20, 30, 15), (0, 0, 0, 10, 5)],
        "c": [],
        "d": [(1, 20, 10, 40, 20)],
        "e": [(0, 30, 15, 20, 20)],
    },
    "val": {"f": [(0, 10, 10, 40, 20)], "g": [(1, 50, 5, 30, 30)]},
}


def _image(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(len(path.stem)).integers(0, 255, (*_SIZE[::-1], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def _coco_json(part: str) -> str:
    images, annotations = [], []
    for number, (name, objects) in enumerate(_OBJECTS[part].items()):
        images.append({"id": number, "file_name": f"{name}.png", "width": _SIZE[0], "height": _SIZE[1]})
        for index, x, y, w, h in objects:
            ids = {"id": len(annotations) + 1, "image_id": number, "category_id": index, "iscrowd": 0}
            annotations.append({**ids, "bbox": [x, y, w, h], "area": w * h})
    categories = [{"id": index, "name": name} for index, name in enumerate(_NAMES)]
    return json.dumps({"images": images, "annotations": annotations, "categories": categories})


def coco(root: Path, parts: tuple[str, ...] = ("train", "val")) -> None:
    for part in parts:
        for name in _OBJECTS[part]:
            _image(root / f"{part}2017" / f"{name}.png")
        _write(root / "annotations" / f"instances_{part}2017.json", _coco_json(part))


def roboflow(root: Path) -> None:
    for part, folder in (("train", "train"), ("val", "valid")):
        for name in _OBJECTS[part]:
            _image(root / folder / f"{name}.png")
        _write(root / folder / "_annotations.coco.json", _coco_json(part))


def one_json(root: Path) -> None:
    for name in _OBJECTS["train"]:
        _image(root / "images" / f"{name}.png")
    _write(root / "labels.json", _coco_json("train"))


def _yolo_line(index: int, x: float, y: float, w: float, h: float, polygon: bool = False) -> str:
    values = [(x + w / 2) / _SIZE[0], (y + h / 2) / _SIZE[1], w / _SIZE[0], h / _SIZE[1]]
    if polygon:
        corners = (x, y), (x + w, y), (x + w, y + h), (x, y + h)
        values = [value for px, py in corners for value in (px / _SIZE[0], py / _SIZE[1])]
    return " ".join([str(index), *map(str, values)])


def yolo(root: Path, *, folders: str = "images/{part}", yaml: str | None = None, polygons: bool = False) -> None:
    for part, images in _OBJECTS.items():
        for name, objects in images.items():
            image = root / folders.format(part=part) / f"{name}.png"
            _image(image)
            if objects:  # an image without is background
                label = Path(str(image).replace("images", "labels")).with_suffix(".txt")
                _write(label, "\n".join(_yolo_line(*each, polygon=polygons) for each in objects) + "\n")
                _write(label.with_name(f"._{label.name}"), "of macOS")  # in no way a label
    default = f"train: {folders}\nval: {folders}\nnames: [cat, dog]\n"
    lines = (yaml or default).replace("{root}", str(root)).splitlines()
    text = "\n".join(line.format(part=line[: line.index(":")]) if "{part}" in line else line for line in lines)
    _write(root / "data.yaml", text + "\n")


def _xml(root: Path, part: str, name: str, xml: Path, image: Path) -> None:
    _image(root / image / f"{name}.png")
    found = "".join(
        f"<object><name>{_NAMES[index]}</name><bndbox><xmin>{x + 1}</xmin><ymin>{y + 1}</ymin>"
        f"<xmax>{x + w}</xmax><ymax>{y + h}</ymax></bndbox></object>"
        for index, x, y, w, h in _OBJECTS[part][name]
    )
    size = f"<size><width>{_SIZE[0]}</width><height>{_SIZE[1]}</height><depth>3</depth></size>"
    _write(root / xml / f"{name}.xml", f"<annotation>{size}{found}</annotation>")


def voc(root: Path) -> None:
    for part, images in _OBJECTS.items():
        for name in images:
            _xml(root, part, name, Path("Annotations"), Path("JPEGImages"))
        _write(root / "ImageSets" / "Main" / f"{part}.txt", "\n".join(images) + "\n")


def voc_roboflow(root: Path) -> None:
    for part, folder in (("train", "train"), ("val", "valid")):
        for name in _OBJECTS[part]:
            _xml(root, part, name, Path(folder), Path(folder))


def yolo_lists(root: Path) -> None:
    yolo(root, yaml="path: {root}\ntrain: lists/train.txt\nval: lists/val.txt\nnames: {0: cat, 1: dog}\nnc: 2\n")
    for part in _OBJECTS:
        names = [root / "images" / part / f"{name}.png" for name in _OBJECTS[part]]
        _write(root / "lists" / f"{part}.txt", "\n".join(map(str, names)))


def label_studio(root: Path) -> None:
    yolo(root)
    (root / "data.yaml").unlink()
    shutil.rmtree(root / "images" / "val")
    shutil.rmtree(root / "labels" / "val")
    _write(root / "classes.txt", "cat\ndog\n")


_BOXES: dict[str, tuple[Callable[[Path], None], str]] = {
    "coco": (coco, "COCO"),
    "roboflow": (roboflow, "COCO"),
    "yolo": (yolo, "YOLO"),
    "yolo, path in data.yaml": (
        lambda root: yolo(root / "x", yaml="path: {root}\ntrain: images/train\nval: images/val\nnames: [cat, dog]\n"),
        "YOLO",
    ),
    "yolo, roboflow": (
        lambda root: yolo(
            root,
            folders="{part}/images",
            yaml="train: ../train/images\nval: ../val/images\nnc: 2\nnames: ['cat', 'dog']\n",
        ),
        "YOLO",
    ),
    "yolo, lists": (yolo_lists, "YOLO"),
    "yolo, one folder beside": (lambda root: yolo(root, folders="{part}"), "YOLO"),
    "voc": (voc, "Pascal VOC"),
    "voc, roboflow": (voc_roboflow, "Pascal VOC"),
}


def _objects(data: OwnData, key: str) -> dict[str, list[tuple]]:
    """As pycocotools reads them."""
    read = COCO(data.settings[f"data.{key}.annotations"])
    folder, found = Path(data.settings[f"data.{key}.images"]), {}
    for image in read.imgs.values():
        assert (folder / image["file_name"]).is_file()
        annotations = read.imgToAnns[image["id"]]
        boxes = [(read.cats[each["category_id"]]["name"], *np.round(each["bbox"], 3).tolist()) for each in annotations]
        found[Path(image["file_name"]).stem] = sorted(boxes)
    return found


def _expected(*parts: str) -> dict[str, list[tuple]]:
    every = {name: objects for part in parts for name, objects in _OBJECTS[part].items()}
    return {name: sorted((_NAMES[index], *map(float, box)) for index, *box in every[name]) for name in every}


@pytest.mark.parametrize("form", _BOXES)
def test_boxes_of_every_form_are_the_same(form, tmp_path):
    write, name = _BOXES[form]
    write(tmp_path / "data")
    data = read_folder(tmp_path / "data", tmp_path / "work")
    assert str(data) == f"{name}, 5 training and 2 validation images, 2 classes"
    assert (data.task, data.classes) == ("detect", ("cat", "dog"))
    assert (tmp_path / "work").exists() == (name != "COCO")
    assert (_objects(data, "train"), _objects(data, "test")) == (_expected("train"), _expected("val"))
    for key in ("train", "test"):  # and the project's checker has nothing against them
        files = (data.settings[f"data.{key}.{each}"] for each in ("annotations", "images"))
        assert len(get_coco_dicts(*files, filter_empty=False)) == data.counts[key == "test"]


def test_polygons_teach_masks(tmp_path):
    yolo(tmp_path / "data", polygons=True)
    data = read_folder(tmp_path / "data" / "data.yaml", tmp_path / "work")
    assert data.task == "segment"
    assert _objects(data, "train") == _expected("train")
    read = COCO(data.settings["data.test.annotations"])
    areas = {read.imgs[each["image_id"]]["file_name"]: int(read.annToMask(each).sum()) for each in read.anns.values()}
    assert areas == {"f.png": 800, "g.png": 900}


@pytest.mark.parametrize("write", [one_json, label_studio])
def test_a_split_is_made_once_and_written_down(write, tmp_path):
    write(tmp_path / "data")
    data = read_folder(tmp_path / "data", tmp_path / "work", share=0.4, seed=3)
    assert str(data).endswith("3 training and 2 validation images, 2 classes; 40% chosen for validation (seed 3)")
    train, test = _objects(data, "train"), _objects(data, "test")
    assert not train.keys() & test.keys()
    assert {**train, **test} == _expected("train")
    assert read_folder(tmp_path / "data", tmp_path / "work", share=0.4, seed=3) == data
    other = read_folder(tmp_path / "data", tmp_path / "other", share=0.4, seed=4)
    assert _objects(other, "test").keys() != test.keys()
    with pytest.raises(DatasetError, match="the data set has changed since: name another --output"):
        read_folder(tmp_path / "data", tmp_path / "work", share=0.4, seed=4, overwrite=False)
    with pytest.raises(DatasetError, match="work: lies in the data set: name another --output"):
        read_folder(tmp_path / "data", tmp_path / "data" / "work")


def maps(root: Path, part: str = "", count: int = 5, values: int = 3) -> None:
    for number in range(count):
        _image(root / "images" / part / f"{number}.png")
        labels = np.full(_SIZE[::-1], (number + 1) % values, dtype=np.uint8)
        labels[:5] = 255
        (root / "masks" / part).mkdir(parents=True, exist_ok=True)
        Image.fromarray(labels).save(root / "masks" / part / f"{number}.png")


def test_label_maps(tmp_path):
    maps(tmp_path / "one")
    data = read_folder(tmp_path / "one", tmp_path / "work")
    assert str(data).startswith("label maps, 4 training and 1 validation images, 3 classes; 20% chosen")
    links = [sorted(Path(data.settings[f"data.{part}.labels"]).iterdir()) for part in ("train", "test")]
    assert list(map(len, links)) == [4, 1]
    with pytest.raises(DatasetError, match="the data set has changed since"):
        read_folder(tmp_path / "one", tmp_path / "work", seed=1, overwrite=False)
    read_folder(tmp_path / "one", tmp_path / "work", seed=1)
    again = [sorted(Path(data.settings[f"data.{part}.labels"]).iterdir()) for part in ("train", "test")]
    assert list(map(len, again)) == [4, 1]
    assert again != links
    maps(tmp_path / "two", "train", 3)
    maps(tmp_path / "two", "val", 2)
    _write(tmp_path / "two" / "names.txt", "sky\nsea\nland\nroad\n")
    data = read_folder(tmp_path / "two", tmp_path / "work")
    assert str(data) == "label maps, 3 training and 2 validation images, 4 classes"
    assert data.settings["data.classes"] == ["sky", "sea", "land", "road"]
    assert data.settings["data.test.labels"] == str(tmp_path / "two" / "masks" / "val")


def test_folders_of_classes(folders, tmp_path):
    data = read_folder(folders.root, tmp_path / "work")
    assert str(data) == "folders of classes, 12 training and 9 validation images, 3 classes"
    shutil.rmtree(folders.val)
    data = read_folder(folders.train, tmp_path / "work", share=0.25)
    assert data.counts == (9, 3)
    assert data.task == "classify"


def _after(write: Callable[[Path], None], change: Callable[[Path], object]) -> Callable[[Path], None]:
    def damage(root: Path) -> None:
        write(root)
        change(root)

    return damage


def _label(line: str) -> Callable[[Path], None]:
    return _after(yolo, lambda root: _write(root / "labels" / "train" / "a.txt", f"0 0.5 0.5 0.1 0.1\n{line}\n"))


def _yaml(text: str) -> Callable[[Path], None]:
    return _after(yolo, lambda root: _write(root / "data.yaml", text))


def _xml_edit(old: str, new: str) -> Callable[[Path], None]:
    def change(root: Path) -> None:
        path = root / "Annotations" / "a.xml"
        path.write_text(path.read_text().replace(old, new))

    return _after(voc, change)


_BAD = {
    "outside": (_label("0 0.5 1.2 0.1 0.1"), r"a\.txt:2: coordinate 1.2: expected 0 to 1"),
    "negative": (_label("0 -0.5 0.2 0.1 0.1"), r"a\.txt:2: coordinate -0.5"),
    "not a number": (_label("0 nan 0.2 0.1 0.1"), r"a\.txt:2: coordinate nan"),
    "text": (_label("cat 0.5 0.2 0.1 0.1"), r"a\.txt:2: cat 0.5 0.2 0.1 0.1: expected numbers"),
    "too few": (_label("0 0.5 0.2 0.1"), r"a\.txt:2: 4 values: expected class, centre"),
    "too many": (_label("0 0.5 0.2 0.1 0.1 0.9"), r"a\.txt:2: 6 values: expected class, centre"),
    "class": (_label("2 0.5 0.2 0.1 0.1"), r"a\.txt:2: class 2: expected 0 to 1, the names in data\.yaml"),
    "half a class": (_label("0.5 0.5 0.2 0.1 0.1"), r"a\.txt:2: class 0.5"),
    "no names": (_yaml("train: images/train\n"), r"data\.yaml: has no 'names'"),
    "no train": (_yaml("names: [cat, dog]\n"), r"data\.yaml: has no 'train'"),
    "nowhere": (_yaml("train: pictures\nnames: [a]\n"), r"data\.yaml: pictures: no such folder or file"),
    "nc": (_yaml("train: images/train\nnames: [a]\nnc: 3\n"), r"data\.yaml: nc: 3, but there are 1 names"),
    "gap": (_yaml("train: images/train\nnames: {0: a, 2: b}\n"), r"indices \[0, 2\]: expected 0 to 1"),
    "names": (_yaml("train: images/train\nnames: cat\n"), r"names: 'cat': expected a list"),
    "pose": (_yaml("train: images/train\nnames: [a]\nkpt_shape: [17, 3]\n"), r"kpt_shape: labels of poses"),
    "two images, one label": (
        _after(yolo, lambda root: _image(root / "images" / "train" / "a.jpg")),
        r"a\.png: shares its label file with .*a\.jpg",
    ),
    "no objects": (
        _after(yolo, lambda root: [path.write_text("") for path in (root / "labels" / "val").iterdir()]),
        r"val: 2 images without an object",
    ),
    "yaml": (_yaml("names: [a\n"), r"data\.yaml: cannot be read as YAML"),
    "code": (_yaml("names: !!python/object/apply:os.system [ls]\n"), r"data\.yaml: cannot be read as YAML"),
    "no yaml": (_after(yolo, lambda root: (root / "data.yaml").unlink()), r"has label files, but no data\.yaml"),
    "no image": (
        _after(yolo, lambda root: (root / "images" / "train" / "a.png").unlink()),
        r"labels/train/a\.txt: label without image",
    ),
    "no labels": (_after(yolo, lambda root: shutil.rmtree(root / "labels" / "val")), r"none of 2 images has labels"),
    "broken image": (
        _after(yolo, lambda root: _write(root / "images" / "train" / "a.png", "x")),
        r"images/train/a\.png: cannot be decoded",
    ),
    "no size": (_xml_edit("size>", "sighs>"), r"a\.xml: size/height: None: expected a number"),
    "other size": (_xml_edit("<width>80", "<width>90"), r"a\.xml: size 90 x 40, but .* has 80 x 40"),
    "no box": (_xml_edit("<xmax>30</xmax>", ""), r"a\.xml: bndbox/xmax: None: expected a number in <object>"),
    "no name": (_xml_edit("<name>cat</name>", ""), r"a\.xml: an object without a name"),
    "xml": (_xml_edit("</annotation>", ""), r"a\.xml:1: not valid XML"),
    "no picture": (
        _after(voc, lambda root: (root / "JPEGImages" / "a.png").unlink()),
        r"a\.xml: label without image: expected Annotations/a\.\*, JPEGImages",
    ),
    "list": (
        _after(voc, lambda root: _write(root / "ImageSets" / "Main" / "val.txt", "f\nz\n")),
        r"val\.txt:2: z: has no XML file",
    ),
    "json": (
        _after(roboflow, lambda root: _write(root / "valid" / "_annotations.coco.json", "{")),
        r"_annotations\.coco\.json: not valid JSON",
    ),
    "elsewhere": (
        _after(coco, lambda root: shutil.rmtree(root / "train2017")),
        r"its first image, a\.png, is in none of train2017/",
    ),
    "empty": (lambda root: root.mkdir(), "the folder is empty"),
    "unknown": (lambda root: _write(root / "notes.doc", "x"), "holds none of the forms that are known"),
    "images alone": (lambda root: _image(root / "images" / "a.png"), "holds none of the forms that are known"),
    "several": (_after(yolo, coco), "could be coco or yolo: say which by --format"),
    "format": (_after(coco, lambda root: root), "'tfrecord': expected one of coco, yolo, voc, maps, classes"),
    "mask": (lambda root: maps(root, values=1), r"masks: only 0 and 255 \(pixels to ignore\)"),
    "one image": (lambda root: maps(root, count=1), r"1 image\(s\): expected at least two"),
}


def test_what_is_left_out_later_is_named_by_its_label_file(tmp_path, caplog):
    _label("0 0.5 0.5 0 0")(tmp_path / "data")
    settings = read_folder(tmp_path / "data", tmp_path / "work").settings
    get_coco_dicts(settings["data.train.annotations"], settings["data.train.images"], filter_empty=False)
    assert re.search(r"without usable area in the image are dropped: .*/labels/train/a\.txt:2 ", caplog.text)


@pytest.mark.parametrize("case", _BAD)
def test_what_is_wrong_is_said_with_file_and_line(case, tmp_path):
    write, words = _BAD[case]
    write(tmp_path / "data")
    with pytest.raises(ValueError, match=words) as error:
        read_folder(tmp_path / "data", tmp_path / "work", form="tfrecord" if case == "format" else None)
    assert "\n" not in str(error.value)


def test_one_of_several_forms_is_chosen(tmp_path):
    coco(tmp_path / "data")
    yolo(tmp_path / "data")
    assert read_folder(tmp_path / "data", tmp_path / "work", form="yolo").form == "YOLO"
