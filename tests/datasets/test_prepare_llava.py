"""LLaVA's data sets prepared and verified; the commands in the documentation."""

import json
import re
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from llava_piip.data import published

SCRIPTS = Path(__file__).parents[2] / "datasets"
README = SCRIPTS / "README.md"
NAMES = ["coco/train2017/1.jpg", "ocr_vqa/images/2.jpg"]


@pytest.fixture(scope="module")
def prepare(load_script):
    return load_script("prepare")


@pytest.fixture(scope="module")
def verify(load_script):
    return load_script("verify")


@pytest.fixture
def root(tmp_path, monkeypatch) -> Path:
    """A tuning set of three entries: COCO's image in its archive, OCR-VQA's unpacked under another name."""
    whole = published.PUBLISHED["finetune"]
    small = replace(
        whole,
        records=3,
        records_by_folder={"coco": 1, "ocr_vqa": 1, "": 1},
        folders=tuple(folder for folder in whole.folders if folder.part in ("coco", "ocr_vqa")),
    )
    monkeypatch.setattr(published, "PUBLISHED", {"finetune": small})
    root = tmp_path / "data"
    (root / "coco").mkdir(parents=True)
    (root / "ocr_vqa/images").mkdir(parents=True)
    Image.new("RGB", (9, 9), (9, 9, 9)).save(tmp_path / "1.jpg")
    Image.new("RGB", (9, 9), (9, 9, 9)).save(root / "ocr_vqa/images/2.gif")
    with zipfile.ZipFile(root / "coco/train2017.zip", "w") as archive:
        archive.write(tmp_path / "1.jpg", "train2017/1.jpg")
    said = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A thing."}]
    text = [{"from": "human", "value": "What?"}, {"from": "gpt", "value": "That."}]
    entries = [{"id": name, "image": name, "conversations": said} for name in NAMES]
    (root / small.annotations).write_text(json.dumps([*entries, {"id": "text", "conversations": text}]))
    return root


def test_prepare_then_verify(prepare, verify, root, capsys):
    assert verify.main(["llava-finetune", str(root)]) == 1
    assert capsys.readouterr().out.count("image missing: 1") == 2
    assert prepare.main(["llava-finetune", str(root)]) == 0
    out = capsys.readouterr().out
    assert "1 files unpacked" in out and "1 images got a second name" in out
    assert f"Next: python datasets/verify.py llava-finetune {root}" in out
    assert verify.main(["llava-finetune", str(root), "--decode", "full", "--workers", "1"]) == 0
    out = capsys.readouterr().out
    assert "PROBLEM" not in out
    assert re.search(rf"\| {root}/llava_v1_5_mix665k.json +\| +3 \| +3 \|", out)


def test_prepare_says_what_is_missing(prepare, root, capsys):
    (root / "coco/train2017.zip").unlink()
    assert prepare.main(["llava-finetune", str(root)]) == 1
    out = capsys.readouterr().out
    assert "coco/train2017: http://images.cocodataset.org/zips/train2017.zip" in out
    assert f"-> {root / 'coco/train2017.zip'}, or --archive coco=FILE" in out


def test_verify_reports(verify, root, tmp_path, capsys):
    report = tmp_path / "report.json"
    arguments = ["llava-finetune", str(root), "--report", str(report)]
    assert verify.main(arguments) == 1
    sets = json.loads(report.read_text())["sets"]
    assert [problem["path"] for part in sets for problem in part["problems"] if problem["entry"] is not None] == NAMES
    with pytest.raises(SystemExit):
        verify.main(arguments)
    assert f"{report} exists" in capsys.readouterr().err
    assert verify.main([*arguments, "--force"]) == 1


def test_prepare_with_bad_arguments(prepare, capsys):
    with pytest.raises(SystemExit):
        prepare.main(["llava-finetune", "x", "--archive", "coco"])
    assert "expected PART=FILE" in capsys.readouterr().err


def test_verify_with_bad_arguments(verify, tmp_path):
    with pytest.raises(SystemExit, match=r"error: image folder .* is no folder"):
        verify.main(["llava-files", "--annotations", "a.json", "--image_root", str(tmp_path / "absent")])
    with pytest.raises(SystemExit, match=r"is no folder.*prepare.py llava-finetune .* says what is missing"):
        verify.main(["llava-finetune", str(tmp_path / "absent")])


def test_damaged_archive_stops_with_its_name(prepare, root):
    (root / "coco/train2017.zip").write_bytes(b"PK half")
    with pytest.raises(SystemExit, match=r"error: .*train2017.zip: not a complete zip archive"):
        prepare.main(["llava-finetune", str(root)])
    assert not (root / "coco/train2017").exists()


@pytest.mark.parametrize("script", ["prepare", "verify"])
def test_examples_in_the_help_are_accepted(load_script, script, capsys):
    module = load_script(script)
    with pytest.raises(SystemExit) as end:
        module.main(["--help"])
    assert end.value.code == 0
    help_text = capsys.readouterr().out
    examples = re.findall(rf"\$ python datasets/{script}\.py (.*?)(?:  +#.*)?$", help_text, re.MULTILINE)
    assert len(examples) >= 3
    for example in examples:
        module.parse_args(example.split())


@pytest.mark.parametrize("script", ["prepare", "verify"])
def test_commands_in_the_readme_are_accepted(load_script, script):
    commands = re.findall(rf"^python datasets/{script}\.py (.*?)(?:  +#.*)?$", README.read_text(), re.MULTILINE)
    assert len(commands) >= 2
    for command in commands:
        load_script(script).parse_args(command.split())


def test_published_sizes_in_the_readme():
    text = README.read_text()
    for dataset in published.PUBLISHED.values():
        assert all(str(number) in text for number in (dataset.records, *dataset.records_by_folder.values()))
        assert all(folder.folder.split("/")[-1] in text for folder in dataset.folders)


def test_the_folder_is_no_package():
    """Else it would hide the library `datasets` from everything started in the checkout."""
    assert not (SCRIPTS / "__init__.py").exists()
