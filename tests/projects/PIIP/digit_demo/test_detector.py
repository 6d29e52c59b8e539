"""The whole way through Detectron2, as short as it can be: data set, training, resuming, evaluation, pictures."""

import functools
import json
import re

import pytest

from piip.digit_demo import run

pytest.importorskip("detectron2")


def test_the_detector_trains_goes_on_and_draws(tmp_path, monkeypatch, capfd):
    small = functools.partial(run.prepare_digits, num_train=8, num_val=4)
    monkeypatch.setattr(run, "prepare_digits", small)
    output, data = tmp_path / "a folder (1)", tmp_path / "digits"
    short = ["train.eval_period=1", "train.checkpointer.period=1", "dataloader.train.total_batch_size=2"]
    for iterations, cores in ((1, 2), (2, 1)):  # a process on each
        monkeypatch.setattr(run.os, "sched_getaffinity", lambda _, cores=cores: set(range(cores)))
        run.main(["--output", str(output), "--data", str(data), f"train.max_iter={iterations}", *short])
        assert re.search(r"box AP [\d.]+ \(AP50 [\d.]+\), mask AP", capfd.readouterr().out.splitlines()[-1])
    lines = [json.loads(line) for line in (output / "detector" / "metrics.json").read_text().splitlines()]
    assert {line["iteration"] for line in lines if "bbox/AP" in line} >= {1, 2}
    assert (output / "predictions.png").is_file() and (output / "curves.png").is_file()
