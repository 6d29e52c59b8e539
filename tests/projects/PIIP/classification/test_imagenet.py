"""Unpacking and checking ImageNet, with a few images instead of a million."""

from __future__ import annotations

import hashlib
import io
import json
import tarfile

import numpy as np
import pytest

pytest.importorskip("detectron2")

import torchvision.datasets.imagenet as published
from PIL import Image
from scipy.io import savemat

from piip.data import DatasetError
from piip.data.classification.audit import audit_classes
from piip.data.classification.imagenet import DEVKIT, Split, audit_imagenet, prepare_imagenet
from piip_core.archives import ArchiveError

SPLITS = (Split("train", "ILSVRC2012_img_train.tar", 2, 5), Split("val", "ILSVRC2012_img_val.tar", 2, 3))
TRAIN = {"n02000002": 2, "n01000001": 3}
VAL_IDS = [2, 1, 2]  # of the development kit
IDS = {1: "n02000002", 2: "n01000001"}


def jpeg(number: int) -> bytes:
    file = io.BytesIO()
    pixels = np.random.default_rng(number).integers(0, 256, (8, 10, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(file, "JPEG")
    return file.getvalue()


def tar(path_or_file, files: dict[str, bytes], mode: str = "w") -> None:
    target = {"fileobj": path_or_file} if isinstance(path_or_file, io.BytesIO) else {"name": path_or_file}
    with tarfile.open(mode=mode, **target) as opened:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            opened.addfile(info, io.BytesIO(content))


def class_archive(name: str, count: int) -> bytes:
    file = io.BytesIO()
    tar(file, {f"{name}_{k}.JPEG": jpeg(k) for k in range(count)})
    return file.getvalue()


def devkit(path) -> None:
    """Two classes below a third, and the classes of the validation images."""
    rows = [(1, IDS[1], "crane, bird", "x", 0), (2, IDS[2], "tench", "x", 0), (3, "n00000000", "animal", "x", 2)]
    kinds = [("ILSVRC2012_ID", "O"), ("WNID", "O"), ("words", "O"), ("gloss", "O"), ("num_children", "O")]
    meta = io.BytesIO()
    savemat(meta, {"synsets": np.array([rows], dtype=kinds).T})
    labels = "\n".join(map(str, VAL_IDS)).encode()
    inside = "ILSVRC2012_devkit_t12/data"
    files = {f"{inside}/meta.mat": meta.getvalue(), f"{inside}/ILSVRC2012_validation_ground_truth.txt": labels}
    tar(str(path), files, "w:gz")


@pytest.fixture
def root(tmp_path, monkeypatch):
    """A folder with the archives as they are downloaded."""
    tar(str(tmp_path / SPLITS[0].archive), {f"{name}.tar": class_archive(name, n) for name, n in TRAIN.items()})
    tar(str(tmp_path / SPLITS[1].archive), {f"ILSVRC2012_val_{k:08d}.JPEG": jpeg(k) for k in (3, 1, 2)})
    devkit(tmp_path / DEVKIT)
    checksum = hashlib.md5((tmp_path / DEVKIT).read_bytes()).hexdigest()
    monkeypatch.setitem(published.ARCHIVE_META, "devkit", (DEVKIT, checksum))
    return tmp_path


def prepare(root, **kwargs):
    return prepare_imagenet(root, splits=SPLITS, **kwargs)


def audit(root, **kwargs):
    return audit_imagenet(root, splits=SPLITS, **kwargs)


def test_the_archives_become_folders_of_classes(root):
    assert prepare(root) == {"train": 5, "val": 3}
    for name, count in TRAIN.items():
        folder = root / "imagenet" / "train" / name
        assert {p.name: p.read_bytes() for p in folder.iterdir()} == {f"{name}_{k}.JPEG": jpeg(k) for k in range(count)}
    for number, class_id in enumerate(VAL_IDS, 1):
        path = root / "imagenet" / "val" / IDS[class_id] / f"ILSVRC2012_val_{number:08d}.JPEG"
        assert path.read_bytes() == jpeg(number)
    assert prepare(root) == {"train": 0, "val": 0} and audit(root).ok
    summary = audit(root).summary()
    assert "| train |        5 |          5 |         2 | 2 to 3" in summary


def test_an_interrupted_run_goes_on(root):
    archive = root / SPLITS[0].archive
    whole = archive.read_bytes()
    archive.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ArchiveError, match=r"n01000001\.tar in it is damaged|not a complete tar archive"):
        prepare(root)
    assert [p.name for p in (root / "imagenet" / "train").iterdir()] == ["n02000002"]  # whole, and no debris
    archive.write_bytes(whole)
    assert prepare(root) == {"train": 3, "val": 3} and audit(root).ok


def test_archives_that_are_not_the_data_set_are_refused(root):
    (root / DEVKIT).rename(root / "kit")
    with pytest.raises(DatasetError, match=rf"has no {DEVKIT}\. Archives are given out at"):
        prepare(root)
    (root / DEVKIT).write_bytes(b"x")
    with pytest.raises(ArchiveError, match=rf"{DEVKIT}: is damaged, or is not ILSVRC2012's"):
        prepare(root)
    (root / "kit").rename(root / DEVKIT)
    tar(str(root / SPLITS[1].archive), {"ILSVRC2012_val_00000001.JPEG": jpeg(1)})
    with pytest.raises(DatasetError, match=r"img_val\.tar: 1 images: expected 3"):
        prepare(root)
    assert not (root / "imagenet" / "val").exists()
    tar(str(root / SPLITS[1].archive), {"../ILSVRC2012_val_00000001.JPEG": jpeg(1)})
    with pytest.raises(ArchiveError, match=r"entry '\.\./ILSVRC2012_val_00000001\.JPEG': expected only files"):
        prepare(root)
    tar(str(root / SPLITS[0].archive), {"n01000001.tar": class_archive("n01000001", 3)})
    (root / "imagenet" / "train").rename(root / "before")
    with pytest.raises(DatasetError, match=r"img_train\.tar: 1 classes: expected 2\. Is the download complete"):
        prepare(root)


def test_everything_that_is_wrong_is_reported(root, tmp_path):
    prepare(root)
    train, val = root / "imagenet" / "train", root / "imagenet" / "val"
    broken = train / "n01000001" / "n01000001_0.JPEG"
    broken.write_bytes(broken.read_bytes()[:100])
    next((val / "n02000002").iterdir()).unlink()
    (val / "n03").mkdir()
    found = audit(root)
    kinds = [[kind for kind, _, _ in part.problems] for part in found.sets]
    assert kinds[0] == ["image unreadable"] and sorted(set(kinds[1])) == [
        "class without images",
        "classes differ",
        "number of classes or images",
    ]
    assert not found.ok and "n01000001_0.JPEG: cannot be decoded" in found.summary()
    found.write_json(tmp_path / "report.json")
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["sets"][0]["images"] == {"n01000001": 3, "n02000002": 2}
    assert audit(root, decode=False).sets[0].problems == []
    assert audit_classes([("mine", str(train), None, None)], decode=False).ok
    nowhere = audit_classes([("mine", str(root / "nowhere"), None, None)])
    assert [kind for kind, _, _ in nowhere.sets[0].problems] == ["folder unusable"]
