"""The training tool: resuming, crashes, evaluation, and mistakes on the command line."""

from __future__ import annotations

import argparse
import itertools
import json
import logging
import os
import pickle
import re
import resource
import runpy
import shutil
import sys
from contextlib import contextmanager, nullcontext
from pathlib import Path

import pytest

pytest.importorskip("detectron2")

import torch
from detectron2.config import LazyConfig, instantiate
from detectron2.modeling.roi_heads import FastRCNNConvFCHead
from detectron2.utils.events import EventStorage, JSONWriter
from safetensors.torch import save_file
from torch import nn

from piip.checkpointer import AtomicCheckpointer, read_categories
from piip.data import DatasetError
from piip.hooks import MetricWriters, StepSeed
from piip.lazy_config import follow_annotations, load_config
from piip.train import do_train, main
from piip_core.errors import CheckpointError, ConfigError, OutputFolderError, SaveError


def _train(config, output, *opts, resume=False, eval_only=False):
    args = argparse.Namespace(config_file=config, resume=resume, eval_only=eval_only)
    args.opts = [f"train.output_dir={output}", *opts]
    main(args)
    return output


def _weights(output, name="model_final.pth"):
    return torch.load(Path(output) / name, weights_only=True)["model"]


def _assert_same_weights(left, right):
    assert left.keys() == right.keys()
    for name in left:
        assert torch.equal(left[name], right[name]), name


def _metrics(output):
    lines = [json.loads(line) for line in (Path(output) / "metrics.json").read_text().splitlines()]
    merged: dict[int, dict] = {}
    for line in lines:
        merged.setdefault(line["iteration"], {}).update(line)
    return merged


@pytest.fixture(scope="module")
def finished_run(tiny_config, shared_coco, tmp_path_factory) -> Path:
    """Four iterations with a checkpoint after two, evaluated."""
    output = tmp_path_factory.mktemp("run") / "output"
    return _train(tiny_config, output, *shared_coco.overrides("train", "test"))


def _interrupt(run: Path, output: Path) -> None:
    """What a run that was killed after two iterations leaves behind."""
    output.mkdir()
    shutil.copy(run / "model_0000001.pth", output)
    (output / "last_checkpoint").write_text("model_0000001.pth")


@pytest.mark.parametrize("workers", [0, 1])
def test_a_resumed_run_equals_an_uninterrupted_one(finished_run, tiny_config, shared_coco, tmp_path, workers):
    output = tmp_path / "output"
    _interrupt(finished_run, output)
    opts = [*shared_coco.overrides("train", "test"), f"dataloader.train.num_workers={workers}"]
    _train(tiny_config, output, *opts, resume=True)
    _assert_same_weights(_weights(output), _weights(finished_run))
    ours, whole = _metrics(output), _metrics(finished_run)
    assert min(ours) == 2
    assert [ours[iteration]["lr"] for iteration in (2, 3)] == [whole[iteration]["lr"] for iteration in (2, 3)]
    written = (output / "model_final.pth").stat().st_mtime_ns
    _train(tiny_config, output, *opts, resume=True)  # nothing is left to do
    assert (output / "model_final.pth").stat().st_mtime_ns == written


def test_a_drawn_seed_is_kept_by_the_checkpoint(tiny_config, shared_coco, tmp_path):
    opts = [*shared_coco.overrides("train"), "data.test.annotations=null", "train.seed=-1"]
    whole = _train(tiny_config, tmp_path / "whole", *opts)
    part = tmp_path / "part"
    _interrupt(whole, part)
    _train(tiny_config, part, *opts, resume=True)
    _assert_same_weights(_weights(part), _weights(whole))
    other = _train(tiny_config, tmp_path / "other", *opts)
    assert any(not torch.equal(a, b) for a, b in zip(_weights(other).values(), _weights(whole).values(), strict=True))


def test_a_run_writes_what_is_promised(finished_run):
    names = {path.name for path in finished_run.iterdir()}
    assert {"config.yaml", "log.txt", "metrics.json", "last_checkpoint", "model_final.pth"} <= names
    assert any(name.startswith("events.out.tfevents") for name in names)
    assert "bbox/AP" in _metrics(finished_run)[4]
    assert (finished_run / "inference" / "coco_instances_results.json").is_file()
    assert [c.name for c in read_categories(str(finished_run / "model_final.pth"))] == ["square", "bar", "disc"]
    saved = LazyConfig.load(str(finished_run / "config.yaml"))
    assert instantiate(saved.model).roi_heads.num_classes == 3


def test_eval_only_repeats_the_evaluation_of_the_run(finished_run, tiny_config, shared_coco, tmp_path):
    checkpoint = f"train.init_checkpoint={finished_run / 'model_final.pth'}"
    output = _train(tiny_config, tmp_path / "o", checkpoint, *shared_coco.overrides("test"), eval_only=True)
    results = [
        json.loads((run / "inference" / "coco_instances_results.json").read_text()) for run in (output, finished_run)
    ]
    assert results[0]
    assert results[0] == results[1]
    written = json.loads((output / "evaluation.json").read_text())
    assert written["bbox"]["AP"] == _metrics(finished_run)[4]["bbox/AP"]


def test_eval_only_needs_a_checkpoint_that_fits(finished_run, tiny_config, shared_coco, tmp_path, coco):
    opts = shared_coco.overrides("test")
    with pytest.raises(ConfigError, match=r"no checkpoint: give train.init_checkpoint=PATH"):
        _train(tiny_config, tmp_path, *opts, eval_only=True)
    with pytest.raises(CheckpointError, match=r"gone.pth: no such file"):
        _train(tiny_config, tmp_path, "train.init_checkpoint=gone.pth", *opts, eval_only=True)
    data = coco.read()
    data["categories"].append({"id": 99, "name": "ring"})
    coco.write(data)
    checkpoint = f"train.init_checkpoint={finished_run / 'model_final.pth'}"
    with pytest.raises(DatasetError, match=r"on 3 classes, the test set has 4: class 3 is none there and 'ring' here"):
        _train(tiny_config, tmp_path, checkpoint, *coco.overrides("test"), eval_only=True)


def test_resuming_on_other_classes_is_an_error(finished_run, tiny_config, coco, tmp_path):
    _interrupt(finished_run, tmp_path / "o")
    data = coco.read()
    data["categories"][0]["name"] = "ring"
    coco.write(data)
    with pytest.raises(DatasetError, match=r"trained on 3 classes \(square, bar, disc\), .* 3 \(square, bar, ring\)"):
        _train(tiny_config, tmp_path / "o", *coco.overrides("train", "test"), resume=True)


def test_a_wrong_test_set_stops_before_training(tiny_config, shared_coco, tmp_path):
    opts = [*shared_coco.overrides("train", "test"), "data.test.images=/nowhere"]
    with pytest.raises(DatasetError, match="/nowhere: no such folder"):
        _train(tiny_config, tmp_path / "o", *opts)
    assert not (tmp_path / "o" / "config.yaml").exists()  # nor is it printed


def test_an_earlier_run_in_the_folder_is_warned_about(finished_run, tiny_config, shared_coco, tmp_path, caplog):
    _interrupt(finished_run, tmp_path / "o")
    cfg = load_config(tiny_config, [*shared_coco.overrides("train"), "data.test.annotations=null", "train.max_iter=1"])
    cfg.train.output_dir = str(tmp_path / "o")
    logging.getLogger("piip").propagate = True  # Detectron2's setup_logger turns it off, and caplog needs it
    with caplog.at_level(logging.WARNING, logger="piip"):
        follow_annotations(cfg, training=True)
        do_train(cfg)
    assert any("holds an earlier run" in record.getMessage() for record in caplog.records)


def _model(seed):
    torch.manual_seed(seed)
    return nn.Linear(64, 64)


@pytest.mark.parametrize("kill_at", range(1, 7))
def test_a_kill_while_saving_leaves_a_complete_checkpoint(tmp_path, kill_at):
    """A save writes, syncs and renames the checkpoint, then syncs and renames its tag; the n-th step is not reached."""
    AtomicCheckpointer(_model(0), str(tmp_path)).save("model_0", iteration=0)
    child = os.fork()
    if child == 0:
        steps = itertools.count(1)

        def dying(function):
            def call(*args):
                if next(steps) == kill_at:
                    os._exit(9)
                return function(*args)

            return call

        def write_half(data, file):
            file.write(b"half of it")
            file.flush()
            os._exit(9)

        real_save = torch.save
        torch.save = write_half if kill_at == 1 else dying(real_save)
        os.fsync, os.replace = dying(os.fsync), dying(os.replace)
        AtomicCheckpointer(_model(1), str(tmp_path)).save("model_1", iteration=1)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == (9 if kill_at < 6 else 0)

    model = _model(2)
    checkpointer = AtomicCheckpointer(model, str(tmp_path), strict=True)
    last = checkpointer.resume_or_load("", resume=True)["iteration"]
    assert last == (0 if kill_at < 6 else 1)
    assert torch.equal(model.weight, _model(last).weight)
    checkpointer.save("model_1", iteration=1)  # leftovers do not get in the way
    assert checkpointer.get_checkpoint_file().endswith("model_1.pth")
    assert not list(tmp_path.glob(".*incomplete"))


def test_a_failed_save_leaves_no_debris(tmp_path, monkeypatch):
    checkpointer = AtomicCheckpointer(_model(0), str(tmp_path))
    checkpointer.save("model_0")

    def full_disk(data, file):
        file.write(b"half of it")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full_disk)
    with pytest.raises(SaveError, match=r"^.*/model_0.pth: could not be written \(No space left .*\): free some space"):
        checkpointer.save("model_0")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["last_checkpoint", "model_0.pth"]
    checkpointer.load(checkpointer.get_checkpoint_file())


@contextmanager
def _no_file_above(limit: int):
    """The system refuses larger files, as if the disk were full."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_an_intermediate_save_that_fails_is_counted_and_the_training_goes_on(
    finished_run, tiny_config, shared_coco, tmp_path, monkeypatch
):
    saves, save = itertools.count(), AtomicCheckpointer.save

    def fail_first(self, name, **kwargs):
        with _no_file_above(2000) if next(saves) == 0 else nullcontext():
            save(self, name, **kwargs)

    monkeypatch.setattr(AtomicCheckpointer, "save", fail_first)
    output = _train(tiny_config, tmp_path / "o", *shared_coco.overrides("train", "test"))
    _assert_same_weights(_weights(output), _weights(finished_run))
    assert not (output / "model_0000001.pth").exists() and not list(output.glob(".*incomplete"))
    log = (output / "log.txt").read_text()
    assert re.search(r"model_0000001.pth: could not be written .* Training goes on \(1 failed so far\)", log)
    assert re.search(r"1 saves failed during the training; the last: .*model_0000001.pth", log)


def test_a_full_disk_keeps_the_last_checkpoint_and_ends_in_one_line(finished_run, tiny_config, shared_coco, tmp_path):
    output = tmp_path / "o"
    _interrupt(finished_run, output)
    opts = [*shared_coco.overrides("train"), "data.test.annotations=null", f"train.output_dir={output}"]
    with _no_file_above(20_000), pytest.raises(SaveError, match=r"model_\w+.pth: could not be written .*") as error:
        main(argparse.Namespace(config_file=tiny_config, opts=opts, resume=True, eval_only=False))
    assert "\n" not in str(error.value) and "File too large" in str(error.value)
    assert AtomicCheckpointer(_model(0), str(output)).get_checkpoint_file() == str(output / "model_0000001.pth")
    assert "Traceback" not in (output / "log.txt").read_text()
    _train(tiny_config, output, *opts[:-1], resume=True)
    _assert_same_weights(_weights(output), _weights(finished_run))


def test_metrics_that_cannot_be_written_stop_nothing(tmp_path):
    with EventStorage() as storage:
        hook = MetricWriters([JSONWriter(str(tmp_path / "metrics.json"))], period=1)
        hook.trainer = argparse.Namespace(iter=0, max_iter=3)
        for hook.trainer.iter in range(3):
            storage.put_scalar("loss", hook.trainer.iter, smoothing_hint=False)
            with _no_file_above(5) if hook.trainer.iter == 1 else nullcontext():
                hook.after_step()
            storage.step()
        hook.after_train()
    lines = (tmp_path / "metrics.json").read_text().splitlines()
    assert [json.loads(line)["loss"] for line in lines] == [0, 1, 2]


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda path: path.write_text("old"), "File exists.*a file is where a folder is expected"),
        (lambda path: path.symlink_to("/proc/1"), "name another place"),
    ],
)
def test_an_output_folder_that_cannot_be_one_is_refused(tiny_config, shared_coco, tmp_path, make, words):
    make(tmp_path / "o")
    with pytest.raises(OutputFolderError, match=f"^{tmp_path / 'o'}: cannot be written to .*" + words):
        _train(tiny_config, tmp_path / "o", *shared_coco.overrides("train"))


def test_a_second_training_in_a_folder_is_refused_before_it_writes(tiny_config, shared_coco, tmp_path, held_folder):
    with pytest.raises(OutputFolderError, match=r"process \d+ on .* is writing to it: .*another train.output_dir"):
        _train(tiny_config, held_folder[0], *shared_coco.overrides("train"))
    assert [path.name for path in held_folder[0].iterdir()] == [".lock"]


class _Evil:
    def __reduce__(self):
        return (os.mkdir, ("executed",))


def test_checkpoints_that_could_run_code_or_are_cut_off_are_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    checkpointer = AtomicCheckpointer(_model(0), strict=True)
    torch.save({"model": {"weight": _Evil()}}, "evil.pth")
    with pytest.raises(CheckpointError, match=r"evil.pth: holds more than tensors"):
        checkpointer.load("evil.pth")
    Path("evil.pkl").write_bytes(pickle.dumps(_Evil()))
    with pytest.raises(CheckpointError, match=r"evil.pkl: expected a .pth or .safetensors file"):
        checkpointer.load("evil.pkl")
    assert not Path("executed").exists()
    torch.save({"model": _model(0).state_dict()}, "whole.pth")
    Path("half.pth").write_bytes(Path("whole.pth").read_bytes()[:5000])
    with pytest.raises(CheckpointError, match=r"half.pth: not a complete PyTorch checkpoint"):
        checkpointer.load("half.pth")
    with pytest.raises(CheckpointError, match=r"bias is not in the file"):
        torch.save({"model": {"weight": _model(0).weight}}, "part.pth")
        checkpointer.load("part.pth")
    checkpointer.load("whole.pth")


def test_safetensors_are_loaded(tmp_path):
    save_file(_model(3).state_dict(), tmp_path / "weights.safetensors")
    model = _model(0)
    AtomicCheckpointer(model, strict=True).load(str(tmp_path / "weights.safetensors"))
    assert torch.equal(model.weight, _model(3).weight)
    assert read_categories(str(tmp_path / "weights.safetensors")) == ()


def test_cuda_without_a_device_is_an_error(tiny_config, shared_coco, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match=r"train.device=cuda: no CUDA device is visible; use train.device=cpu"):
        _train(tiny_config, tmp_path, "train.device=cuda", *shared_coco.overrides("train"))


def test_mixed_precision_on_the_cpu_is_bfloat16_in_training_alone(tiny_config, shared_coco, tmp_path, monkeypatch):
    seen = set()
    forward = FastRCNNConvFCHead.forward

    def spy(self, x):
        out = forward(self, x)
        seen.add((self.training, out.dtype))
        return out

    monkeypatch.setattr(FastRCNNConvFCHead, "forward", spy)
    opts = ["train.amp.enabled=true", "train.max_iter=1", *shared_coco.overrides("train", "test")]
    output = _train(tiny_config, tmp_path / "o", *opts)
    assert seen == {(True, torch.bfloat16), (False, torch.float32)}
    assert {tensor.dtype for tensor in _weights(output).values() if tensor.is_floating_point()} == {torch.float32}
    _train(tiny_config, output, *opts[:1], "train.max_iter=2", *opts[2:], resume=True)
    with pytest.raises(ConfigError, match="'float16' on cpu: expected 'bfloat16', or 'float16' on CUDA"):
        _train(tiny_config, tmp_path / "p", *opts, "train.amp.precision=float16")


def test_a_fixed_seed_wins_over_the_checkpoint_s_and_a_drawn_one_does_not():
    fixed, drawn = StepSeed(5), StepSeed(-1)
    for hook in (fixed, drawn):
        hook.load_state_dict({"seed": 9})
    assert (fixed.seed, drawn.seed) == (5, 9)


def test_the_command_s_errors_are_one_line(tiny_config, tmp_path, repo_root, monkeypatch):
    script = str(repo_root / "tools" / "lazyconfig_train_net.py")
    arguments = ["--config-file", tiny_config, f"train.output_dir={tmp_path}", "data.train.annotations=/nowhere.json"]
    arguments += ["--num-gpus", "1"]  # options may follow the overrides
    monkeypatch.setattr(sys, "argv", [script, *arguments])
    with pytest.raises(SystemExit, match=r"^error: /nowhere.json: no such file.*$"):
        runpy.run_path(script, run_name="__main__")
