"""Laying out a published data set, and images under the names that are expected."""

import json
import os
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from llava_piip.data import ImageFolder, published
from llava_piip.data.audit import audit
from llava_piip.data.published import PUBLISHED, prepare_published, provide_expected_names
from piip_core.errors import UserError

NAMES = {
    "coco": "coco/train2017/1.jpg",
    "gqa": "gqa/images/1.jpg",
    "ocr_vqa": "ocr_vqa/images/1.jpg",
    "textvqa": "textvqa/train_images/1.jpg",
    "vg1": "vg/VG_100K/1.jpg",
    "vg2": "vg/VG_100K_2/1.jpg",
}
INSIDE = {  # names within the public archives
    "coco": "train2017/1.jpg",
    "gqa": "images/1.jpg",
    "ocr_vqa": "images/1.gif",
    "textvqa": "train_images/1.jpg",
    "vg1": "VG_100K/1.jpg",
    "vg2": "VG_100K_2/1.jpg",
}


def picture(path: Path, format: str | None = None, color=(200, 30, 60)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (16, 12), color).save(path, format=format)
    return path


def entry(number: int, image: str) -> dict:
    said = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A thing."}]
    return {"id": str(number), "image": image, "conversations": said}


@pytest.fixture
def finetune():
    counts = {"coco": 1, "gqa": 1, "ocr_vqa": 1, "textvqa": 1, "vg": 2, "": 0}
    return replace(PUBLISHED["finetune"], records=6, records_by_folder=counts)


@pytest.fixture
def root(tmp_path, finetune) -> Path:
    """The tuning set as it is downloaded: a conversation file and the archives where `prepare` looks for them."""
    root = tmp_path / "data"
    root.mkdir()
    (root / finetune.annotations).write_text(json.dumps([entry(i, name) for i, name in enumerate(NAMES.values())]))
    for folder in finetune.folders:
        archive = root / folder.archive
        archive.parent.mkdir(exist_ok=True)
        inside = INSIDE[folder.part]
        content = picture(tmp_path / Path(inside).name).read_bytes()
        with zipfile.ZipFile(archive, "w") as opened:
            opened.writestr(inside, content)
    return root


def test_archives_become_a_complete_data_set(root, finetune):
    done = prepare_published(finetune, root)
    assert not done.sources and len(done.done) == 6
    assert all((root / name).is_file() for name in NAMES.values())
    assert done.renamed == {"ocr_vqa/images/1.jpg": "ocr_vqa/images/1.gif"}
    assert Image.open(root / "ocr_vqa/images/1.jpg").format == "GIF"
    assert audit([root / finetune.annotations], [root], published=finetune, decode="full").ok
    again = prepare_published(finetune, root)
    assert not again.renamed
    assert all(": 0 files unpacked" in line for line in again.done)


def test_what_is_missing_is_told_with_its_source(root, finetune, tmp_path):
    (root / "gqa/images.zip").rename(tmp_path / "elsewhere.zip")
    (root / finetune.annotations).rename(tmp_path / "mix.json")
    lacking = prepare_published(finetune, root)
    assert set(lacking.sources) == {finetune.annotations, "gqa/images"}
    source = lacking.sources["gqa/images"]
    assert "https://downloads.cs.stanford.edu/nlp/data/gqa/images.zip" in source
    assert str(root / "gqa/images.zip") in source and "--archive gqa=FILE" in source

    (tmp_path / "mix.json").rename(root / finetune.annotations)
    assert not prepare_published(finetune, root, archives={"gqa": tmp_path / "elsewhere.zip"}).sources
    with pytest.raises(UserError, match=r"archive for vg: LLaVA-1\.5 mix665k consists of coco, gqa"):
        prepare_published(finetune, root, archives={"vg": tmp_path / "elsewhere.zip"})


def test_an_unpacked_folder_without_its_archive_is_taken_as_it_is(root, finetune):
    picture(root / "coco/train2017/2.jpg")
    (root / "coco/train2017.zip").unlink()
    assert not prepare_published(finetune, root).sources


def test_only_what_is_missing_is_downloaded(root, finetune, monkeypatch):
    wanted = []

    def download(url, path):
        wanted.append((url, path))
        return Path(path)

    monkeypatch.setattr(published, "download", download)
    for part in ("gqa/images.zip", "vg/images2.zip"):
        (root / part).unlink()
    picture(root / "vg/VG_100K_2/1.jpg")
    lacking = prepare_published(finetune, root, fetch=True)
    assert ("https://downloads.cs.stanford.edu/nlp/data/gqa/images.zip", root / "gqa/images.zip") in wanted
    assert not any(path == root / "vg/images2.zip" for _, path in wanted)
    assert set(lacking.sources) == {"gqa/images"}


def test_names_that_are_expected(tmp_path):
    folder = tmp_path / "ocr"
    picture(folder / "there.jpg")
    picture(folder / "gif.gif")
    picture(folder / "both.png")
    picture(folder / "both.gif")
    picture(folder / "upper.PNG")
    picture(folder / "zero.gif")
    (folder / "zero.jpg").write_bytes(b"")
    (folder / "html.gif").write_text("<html>")
    (folder / "text.txt").write_text("no image")
    stems = ("there", "gif", "both", "upper", "zero", "html", "text", "absent")
    before = {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "zero.jpg"}
    provided = provide_expected_names([f"ocr/{stem}.jpg" for stem in stems], ImageFolder(tmp_path))
    assert provided == {
        "ocr/gif.jpg": "ocr/gif.gif",
        "ocr/both.jpg": "ocr/both.png",
        "ocr/upper.jpg": "ocr/upper.PNG",
        "ocr/zero.jpg": "ocr/zero.gif",
    }
    for name, source in provided.items():
        assert (tmp_path / name).read_bytes() == (tmp_path / source).read_bytes()
    assert before.items() <= {path.name: path.read_bytes() for path in folder.iterdir()}.items()


def test_names_where_there_are_no_links(tmp_path, monkeypatch):
    def no_links(*args):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(os, "link", no_links)
    picture(tmp_path / "a.gif")
    assert provide_expected_names(["a.jpg"], ImageFolder(tmp_path)) == {"a.jpg": "a.gif"}
    assert (tmp_path / "a.jpg").read_bytes() == (tmp_path / "a.gif").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.gif", "a.jpg"]
