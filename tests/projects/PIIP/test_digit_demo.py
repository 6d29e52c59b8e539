"""The demo from data set to images, as short as it can be, with and without Detectron2."""

import contextlib
import functools
import importlib
import json
import re
import runpy
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools import mask as coco_mask
from safetensors.torch import load_file

from piip.charts import read_metrics
from piip.digit_demo import __main__ as demo
from piip.digit_demo import classifier
from piip.digit_demo.classifier import run_classifier
from piip.digit_demo.drawing import draw_predictions
from piip_core.files import atomic_path


@pytest.fixture
def small_data(monkeypatch):
    monkeypatch.setattr(demo, "prepare_digits", functools.partial(demo.prepare_digits, num_train=8, num_val=4))


def test_the_detector_trains_goes_on_and_draws(tmp_path, monkeypatch, small_data, capfd):
    """First on two processes through Detectron2's launcher, then on this one."""
    pytest.importorskip("detectron2")
    output, data = tmp_path / "a folder (1)", tmp_path / "digits"

    def run_here(command, **_):
        monkeypatch.setattr(sys, "argv", command[1:])
        runpy.run_path(command[1], run_name="__main__")
        return contextlib.nullcontext(SimpleNamespace(stdout=[], returncode=0))

    short = ["train.eval_period=1", "train.checkpointer.period=1", "dataloader.train.total_batch_size=2"]
    for processes in (2, 1):
        monkeypatch.setattr(demo.os, "sched_getaffinity", lambda _, cores=processes: set(range(cores)))
        demo.main(["--output", str(output), "--data", str(data), f"train.max_iter={3 - processes}", *short])
        assert re.search(r"box AP [\d.]+ \(AP50 [\d.]+\), mask AP", capfd.readouterr().out.splitlines()[-1])
        monkeypatch.setattr(demo, "subprocess", SimpleNamespace(Popen=run_here, PIPE=None))
    lines = [json.loads(line) for line in (output / "detector" / "metrics.json").read_text().splitlines()]
    assert {line["iteration"] for line in lines if "bbox/AP" in line} >= {1, 2}
    with Image.open(output / "predictions.png") as picture:
        picture.load()
        assert min(picture.size) > 100
    assert (output / "detector" / "report.html").read_text().count("<img") >= 3


def test_failed_training_is_an_error_that_names_the_log(tmp_path, monkeypatch, small_data, capsys):
    pytest.importorskip("detectron2")
    monkeypatch.setattr(demo, "_TRAIN", tmp_path / "train.py")
    monkeypatch.setattr(demo.os, "sched_getaffinity", lambda _: {0, 1, 2, 3})
    # Two processes share the cores
    lines = ["import os, sys", "print('model', 'iter: 1', sep='\\n')"]
    lines += ["sys.exit(3 if sys.argv[4] == os.environ['OMP_NUM_THREADS'] == '2' else 4)"]
    (tmp_path / "train.py").write_text("\n".join(lines))
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    with pytest.raises(SystemExit, match=r"exit status 3, see above and .*log\.txt"):
        demo.main(["--output", str(tmp_path / "out"), "--data", str(tmp_path / "digits")])
    assert capsys.readouterr().out.splitlines()[-1] == "iter: 1"  # and no listing of the model


def test_without_detectron2_the_classifier_runs_and_the_last_line_says_so(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(demo.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(demo, "run_classifier", functools.partial(run_classifier, num_train=64, num_val=8, epochs=1))
    demo.main(["--output", str(tmp_path)])
    lines = capsys.readouterr().out.strip().splitlines()
    assert re.fullmatch(r"Left out: the Mask R-CNN detector, because Detectron2 is not installed.*", lines[-1])
    assert any(line.startswith("Validation accuracy") for line in lines)
    assert (tmp_path / "classifier" / "backbone.safetensors").is_file()


def test_restart_forgets_the_earlier_run(tmp_path, monkeypatch):
    calls = []

    def fake(output):
        calls.append(list(output.iterdir()) if output.exists() else [])
        output.mkdir(parents=True, exist_ok=True)
        (output / "classifier.pth").touch()

    monkeypatch.setattr(demo, "run_classifier", fake)
    for options in ([], [], ["--restart"]):
        demo.main(["--classifier", "--output", str(tmp_path), *options])
    assert [len(found) for found in calls] == [0, 1, 0]


def test_importing_the_demo_needs_no_detectron2(monkeypatch):
    for name in [name for name in sys.modules if name.startswith("piip.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "detectron2", None)
    importlib.import_module("piip.digit_demo.__main__")


def test_an_interrupted_classifier_goes_on_as_if_it_was_not(tmp_path, monkeypatch):
    sizes = {"num_train": 64, "num_val": 8}
    run_classifier(tmp_path / "whole", epochs=2, **sizes)
    whole = torch.load(tmp_path / "whole" / "classifier.pth", weights_only=True)

    @contextlib.contextmanager
    def stop(path):
        with atomic_path(path) as aside:
            yield aside
        raise KeyboardInterrupt

    monkeypatch.setattr(classifier, "atomic_path", stop)
    with pytest.raises(KeyboardInterrupt):
        run_classifier(tmp_path / "parts", epochs=2, **sizes)
    monkeypatch.undo()
    run_classifier(tmp_path / "parts", epochs=2, **sizes)
    parts = torch.load(tmp_path / "parts" / "classifier.pth", weights_only=True)

    assert [entry["loss"] for entry in parts["history"]] == [entry["loss"] for entry in whole["history"]]
    torch.testing.assert_close(parts["model"], whole["model"], rtol=0, atol=0)

    state = load_file(tmp_path / "parts" / "backbone.safetensors")
    names = {name: name.replace("backbone.", "backbone.features.", 1) for name in parts["model"]}
    assert state.keys() == {new for old, new in names.items() if not old.startswith("head.")}
    assert all(torch.equal(state[new], parts["model"][old]) for old, new in names.items() if new in state)


def test_metrics_of_a_resumed_run_keep_the_last_value(tmp_path):
    lines = [
        {"iteration": 9, "total_loss": 3.0},
        {"iteration": 19, "total_loss": 2.0, "bbox/AP": 10.0},
        {"iteration": 19, "total_loss": 1.5},
        {"iteration": 29, "bbox/AP": 20.0},
    ]
    path = tmp_path / "metrics.json"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert read_metrics(path) == {"total_loss": ([9, 19], [3.0, 1.5]), "bbox/AP": ([19, 29], [10.0, 20.0])}


def test_predictions_are_drawn_beside_the_ground_truth(tmp_path):
    pytest.importorskip("detectron2")
    (tmp_path / "images").mkdir()
    Image.fromarray(np.full((48, 48, 3), 127, dtype=np.uint8)).save(tmp_path / "images" / "a.png")
    mask = np.zeros((48, 48), dtype=np.uint8, order="F")
    mask[4:34, 4:34] = 1
    rle = coco_mask.encode(mask)
    digit = {"image_id": 1, "category_id": 1, "bbox": [4, 4, 30, 30]}
    digit["segmentation"] = {"size": rle["size"], "counts": rle["counts"].decode()}
    truth = {"images": [{"id": 1, "file_name": "a.png"}], "categories": [{"id": 1, "name": "0"}]}
    (tmp_path / "truth.json").write_text(json.dumps({**truth, "annotations": [digit]}))
    drawn = {}
    for name, score in (("none", None), ("weak", 0.4), ("sure", 0.9)):
        results = [] if score is None else [{**digit, "score": score}]
        (tmp_path / "results.json").write_text(json.dumps(results))
        path = tmp_path / "out" / f"{name}.png"
        draw_predictions(path, "title", tmp_path / "truth.json", tmp_path / "images", tmp_path / "results.json")
        drawn[name] = np.asarray(Image.open(path).convert("RGB")).astype(int)
    assert np.array_equal(drawn["none"], drawn["weak"])
    # Below the headlines, a sure prediction changes the right half only
    changed = np.abs(drawn["sure"] - drawn["none"])[120:].max(axis=(0, 2)) > 30
    half = len(changed) // 2
    assert changed[half:].any() and not changed[: half - 5].any()
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["none.png", "sure.png", "weak.png"]
