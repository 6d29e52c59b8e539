"""Training classifiers with averaged weights, interrupted; two processes and DeepSpeed are in test_deepspeed.py."""

from __future__ import annotations

import argparse
import copy
import json
import shutil
from pathlib import Path

import pytest

pytest.importorskip("detectron2")

import numpy as np
import torch
from detectron2.engine import SimpleTrainer, hooks
from safetensors.torch import load_file
from timm.optim import Lamb
from torch import nn

from piip.checkpointer import read_categories
from piip.data import DatasetError
from piip.deepspeed_training import build_engine
from piip.hooks import FINAL_AVERAGE, WeightAverage, average_settings
from piip.lazy_config import follow_annotations, load_config
from piip.train import evaluate_only, main
from piip_core.errors import ConfigError

CONFIG = str(Path(__file__).parents[1] / "tiny_classifier.py")


def run(output: Path, *opts: str, resume: bool = False, eval_only: bool = False) -> Path:
    opts = [f"train.output_dir={output}", *opts]
    main(argparse.Namespace(config_file=CONFIG, opts=opts, resume=resume, eval_only=eval_only))
    return output


def metrics(folder: Path) -> dict[int, dict]:
    merged: dict[int, dict] = {}
    for line in (folder / "metrics.json").read_text().splitlines():
        merged.setdefault(json.loads(line)["iteration"], {}).update(json.loads(line))
    return merged


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return torch.load(folder / "model_final.pth", weights_only=True)["model"]


def same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


@pytest.fixture(scope="module")
def finished(shared_folders, tmp_path_factory) -> Path:
    """Four iterations in bfloat16 with random erasing and repeated augmentation, a checkpoint after two, evaluated."""
    return run(tmp_path_factory.mktemp("run") / "output", *shared_folders.overrides(), *EVERYTHING)


EVERYTHING = ["train.amp.enabled=True", "dataloader.train.repeats=2", "train.eval_period=2"]


def test_a_resumed_run_equals_an_uninterrupted_one(finished, shared_folders, tmp_path):
    output = tmp_path / "output"
    output.mkdir()
    shutil.copy(finished / "model_0000001.pth", output)
    (output / "last_checkpoint").write_text("model_0000001.pth")
    run(output, *shared_folders.overrides(), *EVERYTHING, "dataloader.train.num_workers=1", resume=True)
    assert same(weights(output), weights(finished))
    assert same(load_file(output / FINAL_AVERAGE), load_file(finished / FINAL_AVERAGE))
    assert metrics(output)[3]["lr"] == metrics(finished)[3]["lr"]


def test_what_a_run_writes_is_evaluated_again(finished, shared_folders):
    for prefix, file in (("", "model_final.pth"), ("ema/", FINAL_AVERAGE)):
        assert [c.name for c in read_categories(str(finished / file))] == ["blue", "green", "red"]
        cfg = load_config(CONFIG, [f"train.init_checkpoint={finished / file}", *shared_folders.overrides()])
        follow_annotations(cfg, training=False)
        again, found = evaluate_only(cfg)["classification"], metrics(finished)[4]
        assert again == {k: pytest.approx(found[f"{prefix}classification/{k}"]) for k in ("top1", "top5")}
        assert 0 < again["top1"] < 100 == again["top5"]
    assert {"classification/top1", "ema/classification/top1"} <= metrics(finished)[1].keys()  # train.eval_period


class _Loss(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3))

    def forward(self, data):
        return {"loss": (self.weight * data).sum()}


def _train_average(folder, iterations, *, model, state=None, start=0):
    """Gradient descent; returns the weights after every iteration and the hook."""
    trainer = SimpleTrainer(model, [torch.tensor([1.0, 2.0, 3.0])] * 9, torch.optim.SGD(model.parameters(), lr=0.1))
    average, seen = WeightAverage(model, str(folder), {"categories": []}, decay=0.75), []
    trainer.register_hooks([average, hooks.CallbackHook(after_step=lambda _: seen.append(model.weight.tolist()))])
    if state is not None:
        average.load_state_dict(state)
    average.start()
    trainer.train(start, iterations)
    return seen, average


def test_the_average_follows_its_definition_also_when_it_goes_on(tmp_path):
    model = _Loss()
    seen, average = _train_average(tmp_path, 4, model=model)
    more, resumed = _train_average(tmp_path, 6, model=model, state=copy.deepcopy(average.state_dict()), start=4)
    expected = np.array(seen[0])  # the first one is taken as it is
    for weights_then in (*seen[1:], *more):
        expected = 0.75 * expected + 0.25 * np.array(weights_then)
    assert len(more) == 2 and resumed.model.weight.tolist() == pytest.approx(expected.tolist(), rel=1e-6)
    assert load_file(tmp_path / FINAL_AVERAGE)["weight"].equal(resumed.model.weight)
    # a run that begins to average in its middle starts from the weights of then, not from those it was built with
    last = np.array(model.weight.tolist())
    after, begun = _train_average(tmp_path, 7, model=model, start=6)
    assert begun.model.weight.tolist() == pytest.approx((0.75 * last + 0.25 * np.array(after[0])).tolist(), rel=1e-6)


def test_other_classes_of_as_many_are_refused(finished, folders, tmp_path):
    (folders.val / "blue").rename(folders.val / "azure")
    opts = [f"train.init_checkpoint={finished / 'model_final.pth'}", f"data.test.images={folders.val}"]
    with pytest.raises(DatasetError, match=r"class 0 is 'blue' there and 'azure' here"):
        run(tmp_path / "o", *opts, eval_only=True)


def test_settings_that_cannot_be_meant():
    with pytest.raises(ConfigError, match=r"train.ema.decay=0.5: expected null with train.deepspeed.stage=3"):
        average_settings(load_config(CONFIG, ["train.deepspeed.stage=3"]))
    with pytest.raises(ConfigError, match=r"train.ema.decay=2: expected a rate"):
        average_settings(load_config(CONFIG, ["train.ema.decay=2"]))
    assert average_settings(load_config(CONFIG, ["train.ema.decay=null", "train.deepspeed.stage=3"])) is None
    model = nn.Linear(2, 2)
    with pytest.raises(ConfigError, match=r"optimizer Lamb: .* ZeRO divides; expected train.deepspeed.stage=0"):
        build_engine(load_config(CONFIG, ["train.deepspeed.stage=1"]), model, Lamb(model.parameters()), 1)
