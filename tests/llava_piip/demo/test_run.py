"""The steps of the demo in their order, with the long ones cut short."""

import functools
import itertools
import json
import shutil
import subprocess
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from llava_piip import PIIPLlavaForConditionalGeneration, PIIPLlavaProcessor
from llava_piip.demo import __main__ as run
from llava_piip.demo import vision
from llava_piip.demo.dataset import prepare_chat_dataset
from llava_piip.train.presets import parse_arguments
from piip_core import ClassifierConfig, PIIPClassifier
from piip_core.checkpoints import write_checkpoint
from piip_core.errors import CheckpointError, UserError
from piip_digits.model import demo_config


@pytest.fixture
def short(monkeypatch, language_model, trained):
    """Hardly trained branches, ten updates of the language model, and stages that give back what they start from."""
    calls = []

    def train_branches(folder):
        shutil.copytree(trained[0], folder)
        return trained[1]

    def stage(command, env):
        options = dict(itertools.pairwise(command))
        model, data, training = parse_arguments([*command[command.index(str(run._TRAIN)) + 1 :], "--deepspeed", "none"])
        calls.append((model, data, training, command[: command.index(str(run._TRAIN))], env))
        shutil.copytree(options["--model"], f"{options['--output_dir']}/{run.FINAL}")
        return subprocess.CompletedProcess(command, 0)

    small = functools.partial(prepare_chat_dataset, num_train=4, num_val=3)
    monkeypatch.setattr(run, "prepare_chat_dataset", small)
    monkeypatch.setattr(run, "train_branches", train_branches)
    monkeypatch.setattr(
        run, "train_language_model", lambda folder, texts: shutil.copytree(language_model[0], folder) and 5.0
    )
    monkeypatch.setattr(run.subprocess, "run", stage)
    return calls


def test_every_step_feeds_the_next_and_a_second_call_repeats_none(short, tmp_path, capsys, monkeypatch):
    output, data = tmp_path / "run", tmp_path / "data"
    arguments = ["--output", str(output), "--data", str(data), "--no-chat", "--", "--max_steps", "7"]
    assert run.main(arguments) == 0
    (first, captions, stage1, launcher, environment), (second, talk, stage2, *_) = short
    assert "deepspeed.launcher.runner" in launcher and environment["DS_ACCELERATOR"] == "cpu"
    assert first.model == second.model == str(output / "start") and second.projector == str(output / "stage1" / "final")
    assert captions.annotations == [str(data / "captions.json")] and stage1.train_parts == ["projector"]
    assert talk.annotations == [str(data / "conversations.json")] and len(stage2.train_parts) == 3
    assert captions.chat_template == talk.chat_template == "vicuna_v1"
    assert stage1.max_steps == stage2.max_steps == 7  # what follows the two dashes reaches both

    processor = PIIPLlavaProcessor.from_pretrained(output / "start")
    assert tuple(processor.image_processor.image_mean) == vision.PIXEL_MEAN
    model = PIIPLlavaForConditionalGeneration.from_pretrained(output / "start")
    for number, branch in enumerate(model.model.vision_tower.pyramid.branches, 1):
        learned, found = load_file(output / "branches" / f"branch{number}.safetensors"), branch.model.state_dict()
        assert learned.keys() == found.keys()
        assert all(torch.equal(learned[name], found[name]) for name in learned)

    scores = json.loads((output / "scores.json").read_text())
    assert {entry["type"] for entry in scores} >= {"which", "count", "where", "colour"}
    printed = capsys.readouterr().out
    assert "question type" in printed and f"\n{data / 'val' / '000002.jpg'}\n" in printed

    monkeypatch.setattr(run, "train_branches", None)  # would fail if it were called again
    assert run.main(arguments) == 0 and len(short) == 2


def test_a_stage_that_stops_is_an_error_that_says_which(short, tmp_path, monkeypatch, capsys):
    failed = subprocess.CompletedProcess([], 3)
    monkeypatch.setattr(run.subprocess, "run", lambda *_, **__: failed)
    (tmp_path / "run" / "start").mkdir(parents=True)
    status = run.main(["--output", str(tmp_path / "run"), "--data", str(tmp_path / "data"), "--no-chat"])
    assert status == 2
    assert "stage1 stopped with exit status 3" in capsys.readouterr().err


def test_a_digits_classifier_is_the_start_of_the_vision_tower(short, tmp_path, monkeypatch):
    torch.manual_seed(0)
    config = ClassifierConfig(pyramid=replace(demo_config(image_size=64), merging=None), head="merged", num_groups=16)
    classifier = PIIPClassifier(config)
    for parameter in classifier.parameters():
        parameter.data += 0.02 * torch.randn_like(parameter)  # the gates of new interactions are closed
    path = write_checkpoint(tmp_path / "digits.safetensors", classifier.state_dict())
    monkeypatch.setattr(run, "train_branches", None)  # nothing to be learned
    with pytest.raises(CheckpointError, match=r"gone\.pth: no such file"):
        run._make_start(tmp_path / "run", tmp_path / "gone.pth")
    start = run._make_start(tmp_path / "run", path)

    model = PIIPLlavaForConditionalGeneration.from_pretrained(start)
    image = torch.rand(1, 3, 128, 128)
    assert model.config.image_seq_length == 64
    tower, expected = model.model.vision_tower.pyramid, classifier.pyramid
    state = expected.state_dict()
    for name, tensor in tower.state_dict().items():
        if not name.endswith("pos_embed"):  # resized: see tests/piip_core/checkpoints/test_pyramid_start.py
            assert torch.equal(tensor, state[name]), name
    assert [tuple(found.shape[2:]) for found in tower(image)] == [(8, 8), (12, 12), (16, 16)]

    (tmp_path / "run" / "branches").mkdir()
    with pytest.raises(UserError, match="started without --classifier"):
        run._make_start(tmp_path / "run", path)
