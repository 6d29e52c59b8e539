"""ADE20K prepared and verified, with three images instead of twenty thousand."""

import json
import zipfile

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("detectron2")

NAME = "ADEChallengeData2016"


@pytest.fixture
def root(tmp_path):
    """A folder with the archive as it is downloaded."""
    rng, source, root = np.random.default_rng(0), tmp_path / "source", tmp_path / "data"
    root.mkdir()
    for split, count in (("training", 2), ("validation", 1)):
        images, labels = (source / NAME / kind / split for kind in ("images", "annotations"))
        for folder in (images, labels):
            folder.mkdir(parents=True)
        for index in range(1, count + 1):
            Image.fromarray(rng.integers(0, 256, (9, 12, 3), dtype=np.uint8)).save(images / f"ADE_{index:08d}.jpg")
            Image.fromarray(rng.integers(0, 151, (9, 12), dtype=np.uint8)).save(labels / f"ADE_{index:08d}.png")
    (source / NAME / "objectInfo150.txt").write_text("x")
    with zipfile.ZipFile(root / f"{NAME}.zip", "w") as archive:
        for path in sorted(source.rglob("*")):
            archive.write(path, path.relative_to(source))
    return root


@pytest.fixture
def prepare(load_script):
    return lambda arguments: load_script("prepare").main(["ade20k", *arguments])


@pytest.fixture
def verify(load_script, monkeypatch):
    script = load_script("verify")
    monkeypatch.setattr(script, "ADE20K", {"training": 2, "validation": 1})
    return lambda arguments: script.main(["ade20k", *arguments])


def test_the_archive_becomes_a_data_set_without_problems(prepare, verify, root, tmp_path, capsys):
    assert prepare([str(root)]) == 0
    assert "7 files unpacked, 0 were there" in capsys.readouterr().out
    (root / NAME / "images" / "training" / "ADE_00000002.jpg").unlink()
    assert prepare([str(root)]) == 0
    assert "1 files unpacked, 6 were there" in capsys.readouterr().out
    report = tmp_path / "report.json"
    assert verify([str(root), "--report", str(report)]) == 0
    for part in json.loads(report.read_text())["sets"]:
        values = [np.asarray(Image.open(path)) for path in (root / NAME / "annotations" / part["title"]).iterdir()]
        whole = np.concatenate(values, axis=None)
        assert part["found"] == len(values)
        assert part["columns"]["ignored pixels"] == f"{(whole == 0).mean():.1%}"
        assert part["columns"]["classes seen"] == f"{len(set(whole.tolist()) - {0})} of 150"


def test_archives_that_are_missing_or_damaged_are_named(prepare, verify, root, tmp_path, capsys):
    for arguments in ([str(tmp_path)], [str(root), "--archive", str(tmp_path / "other.zip")]):
        with pytest.raises(SystemExit, match=r"\.zip: no such file. Download http://.*--download"):
            prepare(arguments)
    whole = root / f"{NAME}.zip"
    whole.write_bytes(whole.read_bytes()[:-30])
    with pytest.raises(SystemExit, match="not a complete zip archive"):
        prepare([str(root)])
    assert [path.name for path in root.iterdir()] == [whole.name]
    assert verify([str(root)]) == 1
    assert capsys.readouterr().out.count("folders unusable: 1") == 2


def test_everything_wrong_is_reported(prepare, verify, root, tmp_path, capsys):
    prepare([str(root)])
    images, labels = ((root / NAME / kind / "training") for kind in ("images", "annotations"))
    cut = images / "ADE_00000001.jpg"
    cut.write_bytes(cut.read_bytes()[:-200])
    Image.fromarray(np.full((9, 12), 151, dtype=np.uint8)).save(labels / "ADE_00000001.png")
    Image.fromarray(np.full((8, 12), 150, dtype=np.uint8)).save(labels / "ADE_00000002.png")
    Image.new("RGB", (12, 9)).save(images / "more.jpg")
    Image.new("RGB", (12, 9)).save(root / NAME / "images" / "validation" / "ADE_00000002.jpg")
    Image.new("L", (12, 9)).save(root / NAME / "annotations" / "validation" / "ADE_00000002.png")
    assert verify([str(root), "--report", str(tmp_path / "report.json"), "--examples", "1"]) == 1
    first, second = json.loads((tmp_path / "report.json").read_text())["sets"]
    assert [(problem["kind"], problem["path"].rpartition("/")[2]) for problem in first["problems"]] == [
        ("images have no label map of the same name that ends in .png", "more.jpg"),
        ("image unreadable", "ADE_00000001.jpg"),
        ("label map unusable", "ADE_00000001.png"),
        ("sizes differ", "ADE_00000002.png"),
    ]
    assert [problem["kind"] for problem in second["problems"]] == ["number of images with a label map"]
    out = capsys.readouterr().out
    assert "label 151 (108 pixels): expected 1 to 150" in out
    assert "8 x 12 (height x width), but its image is 9 x 12" in out
    assert "2 images with a label map: expected 1" in out


def test_own_data_is_checked(verify, tmp_path, capsys):
    """One image and its label map with the values 0, 1 and 2."""
    for kind in ("images", "labels"):
        (tmp_path / kind).mkdir()
    Image.new("RGB", (6, 4)).save(tmp_path / "images" / "1.jpg")
    labels = np.repeat([[0, 0, 1, 2, 2, 2]], 4, axis=0).astype(np.uint8)
    Image.fromarray(labels).save(tmp_path / "labels" / "1.png")
    folders = ["--images", str(tmp_path / "images"), "--labels", str(tmp_path / "labels")]
    report = tmp_path / "report.json"
    assert verify([*folders, "--classes", "3", "--report", str(report)]) == 0
    assert "Everything is in order" in capsys.readouterr().out and report.is_file()
    assert verify([*folders, "--classes", "2", "--reduce-zero-label"]) == 0
    capsys.readouterr()
    assert verify([*folders, "--classes", "4"]) == 0
    out = capsys.readouterr().out
    assert "class 'class 3' occurs in no label map" in out and "in order" not in out
    assert verify([*folders, "--classes", "2"]) == 1
    assert "label 2 (12 pixels): expected 0 to 1 for the classes, 255 to ignore" in capsys.readouterr().out
    with pytest.raises(SystemExit, match=r"error: data.classes=nowhere.txt: no such file"):
        verify([*folders, "--classes", "nowhere.txt"])
    for wrong in ([*folders], [*folders, "--classes", "3", "--report", str(report)], ["--workers", "0"]):
        with pytest.raises(SystemExit, match="2"):
            verify(wrong)
