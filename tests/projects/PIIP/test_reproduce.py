"""tools/reproduce.py on small released models from the stand-in of the hub, against evaluations of the same weights."""

from __future__ import annotations

import argparse
import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("detectron2")

import torch
from detectron2.config import instantiate
from omegaconf import OmegaConf
from PIL import Image

from piip.lazy_config import load_config
from piip.train import main as train_main
from piip_core import zoo
from piip_core.checkpoints import convert_file

HERE = Path(__file__).parent


@dataclass(frozen=True, kw_only=True)
class _Detector(zoo.ZooEntry):
    file: str = ""

    @property
    def config_file(self) -> str:
        return self.file


@dataclass(frozen=True, kw_only=True)
class _Classifier(zoo.ClassificationEntry):
    file: str = ""

    @property
    def config_file(self) -> str:
        return self.file


def _label_maps(folder: Path) -> None:
    """Three images and label maps in ADE20K's layout."""
    rng = np.random.default_rng(0)
    for number in range(3):
        for part, shape, suffix in (("images", (64, 80, 3), "jpg"), ("annotations", (64, 80), "png")):
            path = folder / part / "validation" / f"ADE_val_{number:08d}.{suffix}"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(rng.integers(0, 151, shape).astype(np.uint8)).save(path)


# What published heads and classifiers are like, unlike the tiny ones
_HEADS = ("model.roi_heads.box_head.fc_dims=[32,32]", "model.roi_heads.mask_head.conv_dims=[16,16,16,16,16]")
_FIRST_PATCH = (
    "model.config.pooling=first_patch",
    *(f"model.config.pyramid.branches.branch{number}.network.class_position=False" for number in (1, 2)),
)
# Configuration, where its network's stands, published numbers
_MODELS = {
    "mask_rcnn_tiny": (
        "tiny_piip_mask_rcnn.py",
        "model.backbone.bottom_up.config",
        {"name": "tiny", "published": zoo.PublishedNumbers(box_ap=40.5, mask_ap=30.0)},
    ),
    "upernet_tiny": (
        "tiny_upernet.py",
        "model.backbone.config",
        {"name": "tiny", "head": "upernet", "published": zoo.PublishedNumbers(miou=50.0)},
    ),
    "tiny_classifier": (
        "tiny_classifier.py",
        "model.config",
        {"name": "tiny_classifier", "published": zoo.ClassificationNumbers(80.0, 1.0, 1.0)},
    ),
}


@pytest.fixture
def release(hub, monkeypatch, tmp_path):
    """Releases a small model with random weights, in the form of the public files; returns the path of ours."""

    def release(name: str, *overrides: str) -> Path:
        file, place, facts = _MODELS[name]
        cfg = load_config(str(HERE / file), list(overrides))
        torch.manual_seed(0)
        model = instantiate(cfg.model)
        with torch.no_grad():  # heads that say something
            for parameter in model.parameters():
                parameter.add_(0.05 * torch.randn_like(parameter))
        ours, public = tmp_path / f"{name}_ours.pth", tmp_path / f"{name}.pth"
        torch.save({"model": model.state_dict()}, ours)
        config = instantiate(OmegaConf.select(cfg, place))
        convert_file(ours, public, config=config, to_public=True)
        facts = {**facts, "title": "tiny", "config": config, "file": str(HERE / file)}
        classifier = name == "tiny_classifier"
        entry = _Classifier(**facts, training_config=config) if classifier else _Detector(**facts)
        released = zoo.Released(entry=entry, repository="somebody/tiny", file=public.name)
        assert released.name == name
        hub.repositories.setdefault("somebody/tiny", {})[public.name] = public.read_bytes()
        monkeypatch.setitem(zoo._RELEASED_BY_NAME, name, released)
        return ours

    return release


@pytest.fixture
def real_coco(shared_coco, tmp_path):
    """Overrides for 10 real COCO images beside the checkout where they are, else for synthetic ones; classes."""
    folder = HERE.parents[3] / "shared" / "data" / "coco_tiny"
    annotations = folder / "annotations" / "instances_train2017.json"
    if not annotations.is_file():
        return shared_coco.overrides("test"), 3
    data = json.loads(annotations.read_text())
    data["images"] = data["images"][:10]
    kept = {image["id"] for image in data["images"]}
    data["annotations"] = [one for one in data["annotations"] if one["image_id"] in kept]
    (tmp_path / "ten.json").write_text(json.dumps(data))
    return [f"data.test.annotations={tmp_path / 'ten.json'}", f"data.test.images={folder / 'train2017'}"], 80


@pytest.fixture(scope="session")
def tool(load_tool):
    return load_tool("reproduce")


@pytest.fixture
def in_process(tool, load_tool, monkeypatch):
    """Evaluates in this process what the tool would start a process for; a detector's is started."""
    script = load_tool("lazyconfig_train_net")

    def run(arguments: list[str]) -> None:
        assert arguments[0] == str(tool.TRAIN)
        monkeypatch.setattr(script.sys, "argv", arguments)
        train_main(script.parse_args())

    monkeypatch.setattr(tool, "run_python", run)


def _evaluate(file: str, weights: Path, output: Path, *overrides: str) -> dict:
    args = argparse.Namespace(config_file=str(HERE / file), resume=False, eval_only=True)
    args.opts = [f"train.output_dir={output}", f"train.init_checkpoint={weights}", *overrides]
    train_main(args)
    return json.loads((output / "evaluation.json").read_text())


def _result(output: Path, name: str) -> dict:
    return json.loads((output / name / "reproduced.json").read_text())


def test_a_detector_is_fetched_evaluated_and_compared(release, tool, real_coco, tmp_path, capfd):
    overrides, classes = real_coco
    test = [*overrides, *_HEADS]
    weights = release("mask_rcnn_tiny", f"data.num_classes={classes}", *_HEADS)
    command = ["mask_rcnn_tiny", "--coco", str(tmp_path), "--output", str(tmp_path / "o"), "--device", "cpu", *test]
    assert tool.main(command) == 0
    result, out = _result(tmp_path / "o", "mask_rcnn_tiny"), capfd.readouterr().out
    found = _evaluate("tiny_piip_mask_rcnn.py", weights, tmp_path / "direct", *test)
    ours = {row["metric"]: row["ours"] for row in result["numbers"]}
    assert ours == {"box_ap": found["bbox"]["AP"], "mask_ap": found["segm"]["AP"]}
    assert result["numbers"][0]["difference"] == ours["box_ap"] - 40.5
    assert "| mask_rcnn_tiny | box_ap" in out and "neck and heads in float32, as published" in out
    assert result["checkpoint"]["files"]["mask_rcnn_tiny.pth"]["size"] == len(
        (tmp_path / "mask_rcnn_tiny.pth").read_bytes()
    )
    # the same command goes on, another setting evaluates again, and a small memory refuses beforehand
    written = (tmp_path / "o/mask_rcnn_tiny/reproduced.json").stat().st_mtime_ns
    assert tool.main(command) == 0 and "was evaluated on" in capfd.readouterr().out
    assert (tmp_path / "o/mask_rcnn_tiny/reproduced.json").stat().st_mtime_ns == written
    assert tool.main([*command, "--precision", "bfloat16", "--memory", "0.0001"]) == 1
    assert "left out: mask_rcnn_tiny: needs 0.0 GiB by estimate" in capfd.readouterr().err


def test_segmentors_and_classifiers_and_a_model_that_fails(
    release, tool, in_process, shared_folders, tmp_path, monkeypatch, capfd
):
    _label_maps(tmp_path / "ade")
    segmentor = release("upernet_tiny", "data.num_classes=150")
    classifier = release("tiny_classifier", "data.num_classes=3", "model.config.num_classes=3", *_FIRST_PATCH)
    good = zoo.released("tiny_classifier")
    broken = dataclasses.replace(good, file="gone.pth", entry=dataclasses.replace(good.entry, name="gone"))
    monkeypatch.setitem(zoo._RELEASED_BY_NAME, "gone", broken)
    options = ["--ade20k", str(tmp_path / "ade"), "--imagenet", str(shared_folders.root), "--device", "cpu"]
    options += ["--output", str(tmp_path / "o")]
    monkeypatch.setattr(zoo, "released_models", lambda: [zoo.released(n) for n in ("upernet_tiny", "tiny_classifier")])
    assert tool.main(["--all", *options]) == 0
    ade = tmp_path / "ade"
    folders = [f"data.test.images={ade}/images/validation", f"data.test.labels={ade}/annotations/validation"]
    miou = _evaluate("tiny_upernet.py", segmentor, tmp_path / "direct", *folders)["sem_seg"]["mIoU"]
    assert [row["ours"] for row in _result(tmp_path / "o", "upernet_tiny")["numbers"]] == [miou]
    found = _evaluate(
        "tiny_classifier.py", classifier, tmp_path / "d2", f"data.test.images={shared_folders.val}", *_FIRST_PATCH
    )
    (row,) = _result(tmp_path / "o", "tiny_classifier")["numbers"]
    assert row["ours"] == found["classification"]["top1"] and row["difference"] == row["ours"] - 80
    capfd.readouterr()
    assert tool.main(["gone", *options, "--restart"]) == 1
    assert "gone.pth" in capfd.readouterr().err


def test_what_is_missing_is_said(tool, tmp_path, capsys):
    for arguments, words in (
        (["--all"], "no data are given: expected --coco"),
        (["mask_rcnn_piip_tsb_1568_1120_672"], "its data are not given: expected --coco DIR"),
        (["mask_rcnn_piip_tsb_1568_1120_672", "--coco", str(tmp_path / "no")], "no: no such folder"),
        (["mask_rcnn_piip_tsb"], "close matches are"),
    ):
        with pytest.raises(SystemExit, match=words):
            tool.main(arguments)
    with pytest.raises(SystemExit):
        tool.main([])
    assert "expected names of released models, or --all" in capsys.readouterr().err
