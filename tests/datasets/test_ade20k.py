"""datasets/prepare_ade20k.py and verify_ade20k.py, as they are called."""

import zipfile

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("detectron2")


@pytest.fixture
def folders(tmp_path):
    """One image and its label map with the values 0, 1 and 2."""
    for kind in ("images", "labels"):
        (tmp_path / kind).mkdir()
    Image.new("RGB", (6, 4)).save(tmp_path / "images" / "1.jpg")
    labels = np.zeros((4, 6), dtype=np.uint8)
    labels[:, 2:] = 1
    labels[:, 3:] = 2
    Image.fromarray(labels).save(tmp_path / "labels" / "1.png")
    return ["--images", str(tmp_path / "images"), "--labels", str(tmp_path / "labels")]


def test_own_data_is_checked(load_script, folders, tmp_path, capsys):
    verify = load_script("verify_ade20k").main
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


def test_what_is_missing_or_wrong_is_told(load_script, tmp_path, capsys):
    prepare, verify = load_script("prepare_ade20k").main, load_script("verify_ade20k").main
    with pytest.raises(SystemExit, match=r"ADEChallengeData2016.zip: no such file. Download http"):
        prepare([str(tmp_path)])
    with zipfile.ZipFile(tmp_path / "ADEChallengeData2016.zip", "w") as archive:
        archive.writestr("ADEChallengeData2016/images/training/1.jpg", b"x")
    with pytest.raises(SystemExit, match=r"error: .*1 files in .*expected the published 20210.*Nothing was unpacked"):
        prepare([str(tmp_path)])
    assert verify([str(tmp_path)]) == 1
    out = capsys.readouterr().out
    assert "20210" in out and out.count("folders unusable: 1") == 2
