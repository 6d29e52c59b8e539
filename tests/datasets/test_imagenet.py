"""datasets/prepare_imagenet.py and verify_imagenet.py, as they are called."""

import json

import pytest

pytest.importorskip("detectron2")

from PIL import Image


def test_own_folders(load_script, tmp_path, capsys):
    verify = load_script("verify_imagenet").main
    for name in ("cat", "dog"):
        (tmp_path / "train" / name).mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(tmp_path / "train" / name / "1.png")
    report = tmp_path / "report.json"
    assert verify(["--images", str(tmp_path / "train"), "--report", str(report)]) == 0
    assert "Everything is in order" in capsys.readouterr().out
    assert json.loads(report.read_text())["sets"][0]["images"] == {"cat": 1, "dog": 1}
    with pytest.raises(SystemExit):
        verify(["--images", str(tmp_path / "train"), "--report", str(report)])
    assert "add --force" in capsys.readouterr().err
    (tmp_path / "train" / "dog" / "1.png").write_bytes(b"")
    assert verify(["--images", str(tmp_path / "train")]) == 1
    assert "PROBLEM in" in (out := capsys.readouterr().out) and "image unreadable: 1" in out
    assert verify(["--images", str(tmp_path / "train"), "--count-only"]) == 0


def test_without_archives(load_script, tmp_path, capsys):
    with pytest.raises(
        SystemExit, match=r"has no ILSVRC2012_img_train\.tar, ILSVRC2012_img_val\.tar, ILSVRC2012_devkit"
    ):
        load_script("prepare_imagenet").main([str(tmp_path)])
    assert load_script("verify_imagenet").main([str(tmp_path)]) == 1
    assert "imagenet/val: no such folder" in capsys.readouterr().out
