"""ImageNet prepared and verified, with eight images instead of a million."""

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

ARCHIVES = {kind: name for kind, (name, _) in published.ARCHIVE_META.items()}
TRAIN = {"n02000002": 2, "n01000001": 3}
VAL_IDS = [2, 1, 2]  # of the development kit
IDS = {1: "n02000002", 2: "n01000001"}


def jpeg(number: int) -> bytes:
    file = io.BytesIO()
    pixels = np.random.default_rng(number).integers(0, 256, (8, 10, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(file, "JPEG")
    return file.getvalue()


def tar(files: dict[str, bytes], mode: str = "w") -> bytes:
    content = io.BytesIO()
    with tarfile.open(mode=mode, fileobj=content) as opened:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            opened.addfile(info, io.BytesIO(data))
    return content.getvalue()


def devkit() -> bytes:
    """Two classes below a third, and the classes of the validation images."""
    rows = [(1, IDS[1], "crane, bird", "x", 0), (2, IDS[2], "tench", "x", 0), (3, "n00000000", "animal", "x", 2)]
    kinds = [("ILSVRC2012_ID", "O"), ("WNID", "O"), ("words", "O"), ("gloss", "O"), ("num_children", "O")]
    meta = io.BytesIO()
    savemat(meta, {"synsets": np.array([rows], dtype=kinds).T})
    labels = "\n".join(map(str, VAL_IDS)).encode()
    inside = "ILSVRC2012_devkit_t12/data"
    files = {f"{inside}/meta.mat": meta.getvalue(), f"{inside}/ILSVRC2012_validation_ground_truth.txt": labels}
    return tar(files, "w:gz")


@pytest.fixture
def root(tmp_path, monkeypatch):
    """A folder with the archives as they are downloaded."""
    classes = {name: {f"{name}_{k}.JPEG": jpeg(k) for k in range(count)} for name, count in TRAIN.items()}
    contents = {
        "train": tar({f"{name}.tar": tar(files) for name, files in classes.items()}),
        "val": tar({f"ILSVRC2012_val_{k:08d}.JPEG": jpeg(k) for k in (3, 1, 2)}),
        "devkit": devkit(),
    }
    for kind, content in contents.items():
        (tmp_path / ARCHIVES[kind]).write_bytes(content)
        monkeypatch.setitem(published.ARCHIVE_META, kind, (ARCHIVES[kind], hashlib.md5(content).hexdigest()))
    return tmp_path


@pytest.fixture
def prepare(load_script):
    return lambda arguments: load_script("prepare").main(["imagenet", *arguments])


@pytest.fixture
def verify(load_script, monkeypatch):
    script = load_script("verify")
    monkeypatch.setattr(script, "IMAGENET", {"train": (2, 5), "val": (2, 3)})
    return lambda arguments: script.main(["imagenet", *arguments])


def test_the_archives_become_folders_of_classes(prepare, verify, root, capsys):
    assert prepare([str(root)]) == 0
    for name, count in TRAIN.items():
        folder = root / "imagenet" / "train" / name
        assert {p.name: p.read_bytes() for p in folder.iterdir()} == {f"{name}_{k}.JPEG": jpeg(k) for k in range(count)}
    for number, class_id in enumerate(VAL_IDS, 1):
        path = root / "imagenet" / "val" / IDS[class_id] / f"ILSVRC2012_val_{number:08d}.JPEG"
        assert path.read_bytes() == jpeg(number)
    capsys.readouterr()
    assert prepare([str(root)]) == 0 == verify([str(root)])
    out = capsys.readouterr().out
    assert out.count("already there") == 2
    assert "| train |       5 |          5 |         2 | 2 to 3" in out


def test_an_archive_that_is_missing_or_damaged_leaves_nothing(prepare, root):
    archive = root / ARCHIVES["train"]
    whole = archive.read_bytes()
    for content in (whole[: len(whole) // 2], None):
        archive.unlink() if content is None else archive.write_bytes(content)
        with pytest.raises(SystemExit, match=rf"{ARCHIVES['train']} is not present .* or is corrupted.*image-net.org"):
            prepare([str(root)])
        assert not list((root / "imagenet").iterdir())
    archive.write_bytes(whole)
    (root / ARCHIVES["devkit"]).rename(root / "kit")
    with pytest.raises(SystemExit, match=ARCHIVES["devkit"]):
        prepare([str(root)])
    assert [path.name for path in (root / "imagenet").iterdir()] == ["train"]
    (root / "kit").rename(root / ARCHIVES["devkit"])
    assert prepare([str(root)]) == 0


def test_everything_that_is_wrong_is_reported(prepare, verify, root, capsys):
    prepare([str(root)])
    train, val = root / "imagenet" / "train", root / "imagenet" / "val"
    broken = train / "n01000001" / "n01000001_0.JPEG"
    broken.write_bytes(broken.read_bytes()[:100])
    next((val / "n02000002").iterdir()).unlink()
    (val / "n03").mkdir()
    assert verify([str(root), "--report", str(root / "report.json")]) == 1
    sets = json.loads((root / "report.json").read_text())["sets"]
    kinds = [{problem["kind"] for problem in part["problems"]} for part in sets]
    assert kinds[0] == {"image unreadable"}
    assert kinds[1] == {"class without images", "classes differ", "number of classes", "number of images"}
    assert "n01000001_0.JPEG: cannot be decoded" in capsys.readouterr().out


def test_own_folders(verify, tmp_path, capsys):
    for name in ("cat", "dog"):
        (tmp_path / "train" / name).mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(tmp_path / "train" / name / "1.png")
    report = tmp_path / "report.json"
    own = ["--images", str(tmp_path / "train")]
    assert verify([*own, "--report", str(report)]) == 0
    assert "Everything is in order" in capsys.readouterr().out
    assert json.loads(report.read_text())["sets"][0]["columns"] == {"classes": 2, "images per class": "1 to 1"}
    with pytest.raises(SystemExit):
        verify([*own, "--report", str(report)])
    assert "add --force" in capsys.readouterr().err
    (tmp_path / "train" / "dog" / "1.png").write_bytes(b"")
    assert verify(own) == 1
    assert "PROBLEM in" in (out := capsys.readouterr().out) and "image unreadable: 1" in out
    assert verify([*own, "--count-only"]) == 0
    assert verify(["--images", str(tmp_path / "nowhere")]) == 1
    assert "folder unusable: 1" in capsys.readouterr().out
