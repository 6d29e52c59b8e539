"""A model of your own in three commands: the command line and `Detector`, over the one trainer."""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

pytest.importorskip("detectron2")
pytest.importorskip("skimage")
pytest.importorskip("sklearn")

import onnx
import torch
from detectron2.config import instantiate
from detectron2.engine import SimpleTrainer, hooks
from PIL import Image

import piip
from piip import cli
from piip.checkpointer import AtomicCheckpointer
from piip.compose import TrainOptions, compose, find_model, models
from piip.data import read_image
from piip.data.folders import OwnData
from piip.detector import Detector, Predictions
from piip.fitting import MicroBatches, add_adapters, freeze
from piip.hooks import BEST, BestModel, TrainingEnds
from piip.lazy_config import load_config, skip_pretrained
from piip.predict import Predictor
from piip.train import main
from piip_core import PIIP, BranchConfig, PIIPConfig, TimmConfig
from piip_core.branches import BEiTConfig, ConvNeXtConfig, UniPerceiverConfig
from piip_core.checkpoints import read_checkpoint
from piip_core.errors import CheckpointError, ConfigError, UserError
from piip_core.meta import on_meta
from piip_digits.data_sets import prepare_digits

_SIZES = {"embed_dim": 32, "depth": 3, "num_heads": 4}
_TRAIN = "--model tiny --epochs 2 --batch 4 --image-size 96 --device cpu".split()


@pytest.fixture(scope="module")
def digits(tmp_path_factory) -> Path:
    """Eight digit scenes to train on and two to validate, in COCO's layout."""
    root = tmp_path_factory.mktemp("digits") / "data"
    prepare_digits(root, num_train=8, num_val=2)
    return root


@pytest.fixture(scope="module")
def run(digits, tmp_path_factory) -> Path:
    """Two epochs of two iterations."""
    output = tmp_path_factory.mktemp("run") / "run"
    cli.main(["train", "--data", str(digits), "--output", str(output), *_TRAIN])
    return output


def _weights(run: Path) -> dict[str, torch.Tensor]:
    return torch.load(run / "model_final.pth", weights_only=True)["model"]


def test_train_predict_and_evaluate(run, digits, tmp_path, capsys):
    best = json.loads((run / "best.json").read_text())
    assert best["metric"] == "segm/AP"
    assert read_checkpoint(run / BEST).state.keys() == _weights(run).keys()
    image = next((digits / "val").iterdir())
    predict = ["predict", str(image), "--model", str(run), "--device", "cpu"]
    cli.main([*predict, "--output", str(tmp_path), "--min-score", "0"])
    drawn = json.loads((tmp_path / "predictions.json").read_text())
    found = Detector(run, device="cpu").predict(str(image), min_score=0)
    assert len(found) == len(drawn) > 0
    assert [entry["category_name"] for entry in drawn] == found.names
    boxes = np.array([entry["bbox"] for entry in drawn])
    np.testing.assert_allclose(found.boxes[:, 2:] - found.boxes[:, :2], boxes[:, 2:], atol=1e-3)
    assert found.masks.shape == (len(found), *np.asarray(Image.open(image)).shape[:2])
    capsys.readouterr()
    cli.main(["eval", str(run), str(digits), "--device", "cpu"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"{digits}: COCO, 8 training and 2 validation images, 10 classes"
    assert lines[-1].startswith(f"segm AP {best['value']:.1f} AP50 ")
    for folder in (run, run / "evaluation"):  # the same evaluation, and curves and augmentations of the run
        page = (folder / "report.html").read_text()
        assert re.search(rf"> *{best['value']:.1f} *</td>", page)
        assert page.count("<img") == 6


def test_predict_in_tiles(run, digits, tmp_path):
    pytest.importorskip("sahi")
    image = next((digits / "val").iterdir())
    predict = ["predict", str(image), "--model", str(run), "--device", "cpu", "--output", str(tmp_path)]
    cli.main([*predict, "--tiles", "120", "--min-score", "0.09"])
    detector = Detector(run, device="cpu")
    found = detector.predict(image, tiles=120, min_score=0.09)
    drawn = json.loads((tmp_path / "predictions.json").read_text())
    assert [entry["score"] for entry in drawn] == pytest.approx(found.scores.tolist())
    # 192 pixels are four tiles, which begin at 0 or 72, and the whole
    pixels, crops = read_image(str(image)), []
    for y, x, side in ((0, 0, 120), (0, 72, 120), (72, 0, 120), (72, 72, 120), (0, 0, 192)):
        crop = detector.predict(pixels[y : y + side, x : x + side], min_score=0.09)
        masks = np.zeros((len(crop), 192, 192), dtype=bool)
        masks[:, y : y + side, x : x + side] = crop.masks
        crops += zip(crop.scores, crop.classes, masks, strict=True)
    assert 0 < len(found) <= len(crops)
    for score, category, mask in zip(found.scores, found.classes, found.masks, strict=True):
        assert any(abs(score - s) < 1e-6 and category == c and (mask == m).all() for s, c, m in crops)
    assert max(found.scores) == pytest.approx(max(score for score, _, _ in crops))


def test_images_are_looked_at_larger(run, digits):
    image = read_image(str(next((digits / "val").iterdir())))
    assert Detector(run, device="cpu").predictor.to_input(image).shape == (3, 96, 96)
    detector = Detector(run, device="cpu", image_size=160)
    assert detector.predictor.to_input(image).shape == (3, 160, 160)
    assert (detector.tile_size(True), detector.tile_size(64), detector.tile_size(False)) == (160, 64, None)


@pytest.mark.parametrize("door", ["piip train", "lazyconfig_train_net.py"])
def test_both_doors_go_on_with_a_run(door, run, digits, tmp_path):
    """A run that was killed after an epoch ends with the weights of one that was not."""
    output = tmp_path / "run"
    output.mkdir()
    for name in ("config.yaml", "model_0000001.pth"):
        shutil.copy(run / name, output)
    (output / "last_checkpoint").write_text("model_0000001.pth")
    if door == "piip train":
        Detector("tiny").train(digits, output=output, epochs=2, batch=4, image_size=96, device="cpu")
    else:
        opts = [f"train.output_dir={output}"]
        main(argparse.Namespace(config_file=str(output / "config.yaml"), resume=True, eval_only=False, opts=opts))
    written = [json.loads(line)["iteration"] for line in (output / "metrics.json").read_text().splitlines()]
    assert min(written) >= 2
    theirs = _weights(run)
    assert all(torch.equal(weight, theirs[name]) for name, weight in _weights(output).items())


def test_a_run_of_another_model_is_not_gone_on_with(run, digits):
    with pytest.raises(SystemExit, match="holds a training of another model or task: name another --output"):
        cli.main(["train", "--data", str(digits), "--output", str(run), *_TRAIN, "--task", "detect"])


def test_classifiers_and_segmentors(folders, digits, tmp_path):
    classifier = Detector("tiny", device="cpu")
    options = dict(epochs=1, batch=12)
    best = classifier.train(folders.root, output=tmp_path / "classes", image_size=32, freeze="branches", **options)
    assert best["metric"] == "classification/top1"
    image = Image.open(folders.val / "red" / "0.png")
    found, again = classifier.predict([image, np.asarray(image.convert("RGB"))])
    assert sorted(found.names) == ["blue", "green", "red"]
    assert found.scores.sum() == pytest.approx(1)
    assert (tmp_path / "classes" / "report.html").read_text().count("<img") == 5
    assert found.names == again.names
    for wrong, options in (({"image_size": 64}, {}), ({}, {"tiles": True})):
        with pytest.raises(ConfigError, match="goes with a detector only"):
            Detector(tmp_path / "classes", device="cpu", **wrong).predict(image, **options)
    with pytest.raises(UserError, match="neither boxes nor masks"):
        found.to_supervision()

    for part in ("train", "val"):
        shutil.copytree(digits / part, tmp_path / "maps" / "images" / part)
        shutil.copytree(digits / "labels" / part, tmp_path / "maps" / "masks" / part)
    shutil.copy(digits / "labels" / "names.txt", tmp_path / "maps")
    segmentor = Detector("tiny", device="cpu")
    assert "mIoU" in segmentor.train(tmp_path / "maps", output=tmp_path / "semantic", epochs=1, batch=8)["metric"]
    found = segmentor.predict(next((digits / "val").iterdir()))
    assert (found.masks.sum(axis=0) == 1).all()
    assert len(found.masks) == len(found.names) > 0
    assert (tmp_path / "semantic" / "report.html").read_text().count("<img") == 5


def _data(task: str, images: int = 160) -> OwnData:
    return OwnData("data", task, (images, 40), ("a", "b"), {})


@pytest.mark.parametrize("task", ["detect", "segment", "semantic", "classify"])
def test_default_models_are_fitted_to_small_data(task, tmp_path):
    cfg, lines = compose(_data(task), None, tmp_path, TrainOptions(device="cpu"))
    assert ("from pretrained branches" if task == "semantic" else "from its released weights") in lines[0]
    batch = cfg.dataloader.train.total_batch_size
    recipe, rate = (16, 1e-4) if task in ("detect", "segment") else (16, 4e-5) if task == "semantic" else (1024, 3e-5)
    assert (batch, cfg.optimizer.lr) == (16, pytest.approx(rate * (1 if recipe == 16 else 0.25)))
    assert (cfg.train.max_iter, cfg.train.eval_period) == (1000, 50)
    assert cfg.train.micro_batch == {"classify": 6, "semantic": 2}.get(task, 1)
    schedule = instantiate(cfg.lr_multiplier)
    assert float(schedule(0.0)) < 0.1 * float(schedule(0.15))  # warmup is a part of it, however short it is
    assert float(schedule(0.99)) < 0.1
    skip_pretrained(cfg)
    with on_meta():
        model = instantiate(cfg.model)
    assert getattr(getattr(model, "roi_heads", None), "mask_on", False) == (task == "segment")
    assert not any(isinstance(module, torch.nn.SyncBatchNorm) for module in model.modules())  # for GPUs alone


def test_what_is_asked_for_is_composed(tmp_path):
    options = TrainOptions(device="cpu", image_size=640, epochs=3, batch=8, ema=0.99, weights="random", patience=2)
    cfg, lines = compose(_data("segment"), "tsb_1120_896_448", tmp_path, options)
    assert lines[1:] == [
        "batch 8, 2 at a time, learning rate 7.1e-05 (the recipe's at 16 times 0.71)",
        "3 epochs, 60 iterations, evaluated every 20",
    ]
    assert (cfg.data.train.scales, cfg.data.test.scales) == ([[640, 640]], [[640, 640]])
    assert (cfg.train.best, cfg.train.load_pretrained) == ({"metric": "ema/segm/AP", "patience": 2}, False)
    cfg, _ = compose(_data("classify"), None, tmp_path, TrainOptions(image_size=224))
    sizes = [branch.image_size for branch in instantiate(cfg.model.config).pyramid.branches]
    assert (sizes, cfg.data.image_size, cfg.model.config.pooling) == ([80, 112, 224], 224, "first_patch")


def test_every_model_that_is_listed_is_found(capsys):
    for model in models():
        assert find_model(model.name.removeprefix("piip_"), model.tasks[0]) == model
        assert model.config_file.is_file()
    assert find_model("mask_rcnn_piip_tsb_1568_1120_672").name == "piip_tsb_1568_1120_672"
    cli.main(["models", "--task", "classify"])
    assert "piip_sbl_384_192_128  classify  384/192/128    61.2      top-1 85.9" in capsys.readouterr().out


@pytest.mark.parametrize("command", [[], ["train"], ["predict"], ["eval"], ["export"], ["models"]])
def test_help_fits_a_screen(command, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    with pytest.raises(SystemExit):
        cli.main([*command, "--help"])
    assert len(capsys.readouterr().out.splitlines()) <= 32


@pytest.mark.parametrize(
    ("command", "words"),
    [
        (
            "train --data {digits} --model tsb_1120_896_44",
            "no model is named .*; close are .*tsb_1120_896_448",
        ),
        ("train --data {digits} --model tiny2", "close are tiny"),
        (
            "train --data {digits} --model sbl_384_192_128",
            "is for classify, not for segment: `piip models --task",
        ),
        ("train --data {digits} --task classify", "task='classify': expected segment or detect: that is what the data"),
        ("train --data nowhere", "nowhere: no such folder"),
        ("train --data {digits} --epochs 0", "epochs=0.0: expected a positive number"),
        ("train --data {digits} --model tiny --batch 3 --gpus 2", "batch=3: expected a multiple of 2"),
        ("predict nothing.jpg --model {run} --output {output}", "nothing.jpg: no such file"),
        (
            "predict nothing.jpg --model {output} --output {output}",
            "no config.yaml in it: expected the folder",
        ),
        ("train --data {digits} --validation 1", "--validation=1.0: expected a part of the images"),
        ("predict nothing.jpg --model tiny --output {output}", "no weights were released: train it first"),
        ("eval {digits}/annotations/instances_val.json", r"expected a config.yaml beside it"),
    ],
)
def test_mistakes_end_with_one_line(command, words, run, digits, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    arguments = command.format(digits=digits, run=run, output=tmp_path / "output").split()
    with pytest.raises(SystemExit, match=f"^error: .*{words}") as error:
        cli.main(arguments)
    assert "\n" not in str(error.value)


def test_what_is_missing_is_said(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(SystemExit, match=r"^error: piip needs Detectron2"):
        cli.main(["models"])


_RUN_ONNX = """
import importlib.abc, runpy, sys

class Refuse(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        assert name.split(".")[0] not in ("torch", "detectron2", "cv2", "scipy", "piip", "piip_core"), name

sys.meta_path.insert(0, Refuse())
sys.argv[:] = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def _run_onnx(repo_root, *arguments) -> str:
    """What tools/run_onnx.py prints where nothing but its three packages can be imported."""
    command = [sys.executable, "-I", "-c", _RUN_ONNX, str(repo_root / "tools" / "run_onnx.py"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def test_an_exported_detector_finds_what_the_run_finds(run, digits, tmp_path, capsys, load_tool, repo_root):
    onnxruntime = pytest.importorskip("onnxruntime")
    cli.main(["export", str(run), str(tmp_path / "a.onnx"), "--no-gridsample"])
    assert "largest difference from PyTorch" in capsys.readouterr().out
    session, detect = onnxruntime.InferenceSession(tmp_path / "a.onnx"), load_tool("run_onnx").detect
    notes = session.get_modelmeta().custom_metadata_map
    assert json.loads(notes["names"]) == [str(digit) for digit in range(10)]
    (path,) = sorted((digits / "val").iterdir())[:1]
    image = Image.open(path).convert("RGB")
    found = Detector(run, device="cpu").predict(path, min_score=0)
    for boxes, scores, classes, masks in detect(session, [image, image], min_score=0):
        np.testing.assert_array_equal(classes, found.classes)
        np.testing.assert_allclose(scores, found.scores, atol=1e-3)
        np.testing.assert_allclose(boxes, found.boxes, atol=0.1)
        assert np.mean(np.array(masks) == found.masks) > 0.99
    printed = _run_onnx(repo_root, tmp_path / "a.onnx", tmp_path / "drawn", path)
    assert printed.count("\n") == len(Detector(run, device="cpu").predict(path))
    assert Image.open(tmp_path / "drawn" / f"{path.stem}.png").size == image.size


@pytest.mark.parametrize("form", ["--fp16", "--int8"])
def test_detectors_in_fewer_bits(form, run, digits, tmp_path, load_tool):
    onnxruntime = pytest.importorskip("onnxruntime")
    cli.main(["export", str(run), str(tmp_path / "a.onnx"), form])
    weights = onnx.load(tmp_path / "a.onnx").graph.initializer
    small = {"--fp16": onnx.TensorProto.FLOAT16, "--int8": onnx.TensorProto.INT8}[form]
    sizes = {weight.name: np.prod(weight.dims) for weight in weights if weight.data_type == small}
    assert sum(sizes.values()) > 0.5 * sum(np.prod(weight.dims) for weight in weights)
    (path,) = sorted((digits / "val").iterdir())[:1]
    ((boxes, *_),) = load_tool("run_onnx").detect(
        onnxruntime.InferenceSession(tmp_path / "a.onnx"), [Image.open(path).convert("RGB")], min_score=0
    )
    expected = Detector(run, device="cpu").predict(path, min_score=0).boxes
    distances = np.abs(boxes[:, None] - expected).max(-1).min(0)
    assert np.median(distances) < {"--fp16": 0.5, "--int8": 10}[form]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "--data", "{data}", "--image-size", "3"], "image-size=3: expected at least 32"),
        (["train", "--data", "{data}", "--output", "{file}"], "{file}.*: (Not a directory|File exists)"),
        (["predict", "{file}", "--model", "{run}", "--output", "x", "--min-score", "nan"], "expected 0 to 1"),
        (["predict", "{file}", "--model", "{run}", "--output", "x", "--tiles", "8"], "tiles=8: expected at least 32"),
        (["predict", "{file}", "--model", "{run}", "--output", "x", "--image-size", "8"], "image_size=8: expected at"),
        (["export", "{run}", "{folder}"], "expected a file name that ends in .onnx"),
        (["eval", "{run}", "{classes}"], "expected data of the kind that the model was trained with"),
    ],
)
def test_what_cannot_be_is_said_in_one_line(arguments, message, run, digits, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in "ab":
        (tmp_path / "classes" / name).mkdir(parents=True)
        Image.new("RGB", (32, 32)).save(tmp_path / "classes" / name / "0.png")
    places = dict(
        data=digits, run=run, folder=tmp_path, classes=tmp_path / "classes", file=tmp_path / "classes/a/0.png"
    )
    with pytest.raises(SystemExit, match="^error: .*" + message.format_map(places)) as error:
        cli.main([argument.format_map(places) for argument in arguments])
    assert "\n" not in str(error.value)


def test_other_images_are_read_as_files_are(run):
    detector = Detector(run, device="cpu")
    with pytest.raises(UserError, match="more than 8 bits"):
        detector.predict(Image.fromarray(np.zeros((8, 8), np.uint16)))
    with pytest.raises(UserError, match="bytes: expected a path, a PIL image or an array"):
        detector.predict([b""])
    with pytest.raises(UserError, match=r"image of shape \(0, 8, 3\), uint8: expected \(H, W, 3\)"):
        detector.predict(np.zeros((0, 8, 3), np.uint8))


def test_export_needs_something_to_compare(run, tmp_path, monkeypatch):
    monkeypatch.setattr(Predictor, "__call__", lambda *_: [])
    with pytest.raises(SystemExit, match=r"error: .*the model finds nothing in the images"):
        cli.main(["export", str(run), str(tmp_path / "a.onnx")])


def test_predictions_for_supervision(monkeypatch):
    found = Predictions(np.ones((1, 4)), None, np.array([0.5]), np.array([3]), ["cat"])
    monkeypatch.setitem(sys.modules, "supervision", None)
    with pytest.raises(UserError, match="pip install supervision"):
        found.to_supervision()
    monkeypatch.setitem(sys.modules, "supervision", SimpleNamespace(Detections=dict))
    made = found.to_supervision()
    assert (made["xyxy"] is found.boxes, made["confidence"], made["class_id"]) == (True, [0.5], [3])
    assert made["data"]["class_name"].tolist() == ["cat"]


def test_the_package_offers_its_class_without_loading_it():
    assert piip.Detector is Detector
    with pytest.raises(AttributeError, match="no attribute 'Segmentor'"):
        piip.Segmentor  # noqa: B018


class _Losses(torch.nn.Module):
    """A mean over images, and memory for `room` of them."""

    def __init__(self, room: int = 100) -> None:
        super().__init__()
        self.linear, self.room, self.seen = torch.nn.Linear(3, 2).double(), room, []

    def forward(self, batch):
        if len(batch) > self.room:
            raise torch.OutOfMemoryError("full")
        self.seen.append(len(batch))
        values = self.linear(torch.stack([sample["image"] for sample in batch]))
        return {"loss": values.square().mean(), "other": values.abs().mean()}


@pytest.mark.parametrize(("size", "room", "seen"), [(2, 9, [2, 2, 1]), (9, 9, [5]), (8, 3, [2, 2, 1]), (2, 1, [1] * 5)])
def test_a_batch_in_parts_gives_the_gradients_of_the_whole(size, room, seen):
    torch.manual_seed(0)
    batch = [{"image": torch.randn(3, dtype=torch.float64)} for _ in range(5)]
    whole, model = _Losses(), _Losses(room)
    model.load_state_dict(whole.state_dict())
    parts = MicroBatches(model, size)
    expected, losses = whole(batch), parts(batch)
    sum(expected.values()).backward()
    sum(losses.values()).backward()  # as the trainer does
    assert model.seen == seen
    for name, loss in expected.items():
        torch.testing.assert_close(losses[name], loss)
    for ours, theirs in zip(model.parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad)
    with pytest.raises(torch.OutOfMemoryError):
        MicroBatches(_Losses(room=0), 4)(batch)


def test_on_a_gpu_the_first_images_say_how_many_fit(monkeypatch):
    """2 GiB of 10 are taken, 4 by two images; a tenth stays free: 3.6 images."""
    gib = 2**30
    monkeypatch.setattr(MicroBatches, "_memory", lambda _: ("cuda", 2 * gib))
    for name, value in dict(max_memory_allocated=6, memory_allocated=2, memory_reserved=6).items():
        monkeypatch.setattr(torch.cuda, name, lambda _, value=value: value * gib)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (4 * gib, 10 * gib))
    model = _Losses()
    parts = MicroBatches(model, 8)
    batch = [{"image": torch.ones(3, dtype=torch.float64)}] * 8
    parts(batch)
    parts(batch)
    assert model.seen == [2, 2, 2, 2] + [2, 2, 2, 2]
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (40 * gib, 46 * gib))
    model.seen.clear()
    MicroBatches(model, 8)(batch)
    assert model.seen == [2, 6]


def test_adapters_are_trained_in_place_of_the_branches(run, digits, tmp_path):
    start, output = _weights(run), tmp_path / "lora"
    weights = ["--weights", str(run / "model_final.pth"), "--output", str(output)]
    cli.main(["train", "--data", str(digits), *weights, *_TRAIN, "--lora", "2"])
    cfg = load_config(str(output / "config.yaml"))
    model = instantiate(cfg.model)
    add_adapters(model, 2)
    trained = _weights(output)
    model.load_state_dict(trained)
    for name in [name for name, _ in instantiate(cfg.model).named_parameters() if ".branches." in name]:
        layer, _, kind = name.rpartition(".")
        assert torch.equal(trained.get(f"{layer}.base_layer.{kind}", trained.get(name)), start[name])
    adapters = {name: parameter for name, parameter in model.named_parameters() if ".lora_B." in name}
    assert adapters and all(parameter.abs().sum() > 0 for parameter in adapters.values())
    predictor = Detector(output / "model_final.pth", device="cpu").predictor
    assert not any(".lora_" in name for name in predictor.model.state_dict())
    image = predictor.to_input(read_image(str(next((digits / "val").iterdir()))))
    with torch.no_grad():
        maps = model.eval().backbone.bottom_up(image[None].float())
        for name, found in predictor.model.backbone.bottom_up(image[None].float()).items():
            torch.testing.assert_close(found, maps[name], rtol=1e-4, atol=1e-4)
    with pytest.raises(CheckpointError, match="has LoRA adapters, and the model none"):
        AtomicCheckpointer(instantiate(cfg.model)).load(str(output / "model_final.pth"), checkpointables=[])


@pytest.mark.parametrize(
    "network",
    [
        BEiTConfig(**_SIZES, bias_window=6),
        ConvNeXtConfig(depths=(1, 1, 2, 1), stage_dims=(32, 32, 64, 64)),
        UniPerceiverConfig(**_SIZES, pos_grid=4),
        TimmConfig(name="vit_small_patch16_dinov3", options=_SIZES),
    ],
    ids=lambda network: type(network).__name__,
)
def test_adapters_take_part_in_every_family(network, randomize):
    model = randomize(PIIP(PIIPConfig(branches=[BranchConfig(network=network, image_size=size) for size in (96, 96)])))
    add_adapters(model, 1)
    sum(tokens.square().sum() for tokens in model(torch.randn(1, 3, 96, 96))).backward()
    adapters = {name: parameter for name, parameter in model.named_parameters() if ".lora_B." in name}
    assert adapters and all(parameter.grad.any() for parameter in adapters.values())
    others = [name for name, p in model.branches.named_parameters() if p.requires_grad and ".lora_" not in name]
    assert not others


def test_frozen_parts_are_not_trained():
    cfg = load_config(str(find_model("tiny", "segment").config_file))
    model = instantiate(cfg.model)
    freeze(model, "branches")
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert not any(".branches." in name for name in trained)
    assert any(".interactions." in name for name in trained)
    pyramid = model.train().backbone.bottom_up.features.pyramid
    assert pyramid.interactions[0].training and not pyramid.branches[0].model.blocks[0].training
    freeze(model, "all-but-heads")
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert {name.split(".")[0] for name in trained} == {"backbone", "proposal_generator", "roi_heads"}
    assert not any("bottom_up" in name for name in trained)
    with pytest.raises(ConfigError, match=r"train.freeze='heads': expected one of"):
        freeze(model, "heads")


def test_the_best_weights_are_kept_and_training_ends_without_better_ones(tmp_path):
    scores = iter([1.0, 3.0, float("nan"), 2.0, 2.5, 2.6, 2.7])

    def train(start: int, patience: int | None) -> int:
        model = _Losses()
        batches = iter(lambda: [{"image": torch.ones(3, dtype=torch.float64)}], None)
        trainer = SimpleTrainer(model, batches, torch.optim.SGD(model.parameters(), lr=0.1))
        best = BestModel(model, tmp_path, {}, period=2, metric="bbox/AP", patience=patience)
        trainer.register_hooks([hooks.EvalHook(2, lambda: {"bbox": {"AP": next(scores)}}), best])
        try:
            trainer.train(start, 20)
        except TrainingEnds:
            return trainer.iter + 1
        raise AssertionError("went on to the end")

    assert train(0, 2) == 8  # 3.0 came after four iterations
    assert json.loads((tmp_path / "best.json").read_text()) == {"metric": "bbox/AP", "value": 3.0, "iteration": 4}
    assert train(8, 2) == 9  # done already, and nothing is trained
    assert train(8, 3) == 10  # one more
    with pytest.raises(ConfigError, match="patience=0"):
        BestModel(_Losses(), tmp_path, {}, period=2, metric="bbox/AP", patience=0)
