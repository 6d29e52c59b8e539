"""The branches learn and their weights arrive; the steps of the demo in their order, with the long ones cut short.

One file: branches that were trained once serve both.
"""

import functools
import itertools
import json
import shutil
import subprocess
from dataclasses import replace

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from llava_piip import PIIPLlavaForConditionalGeneration, PIIPLlavaProcessor
from llava_piip.demo import __main__ as run
from llava_piip.demo import vision
from llava_piip.demo.dataset import prepare_chat_dataset
from llava_piip.demo.questions import CHAT_SCENES
from llava_piip.image_processing import PIIPImageProcessor
from llava_piip.train.presets import parse_arguments
from piip_core import PIIP, ClassifierConfig, PIIPClassifier
from piip_core.checkpoints import load_pretrained, write_checkpoint
from piip_core.errors import CheckpointError, UserError
from piip_digits.composer import DigitComposer
from piip_digits.model import demo_config
from piip_digits.scenes import NAMED_COLOURS
from piip_tools.timing import limited_threads

# Its processes are forked for they have few photographs then, too; spawned ones would also import all there is
TEACH = """
import multiprocessing, sys
from pathlib import Path
from llava_piip.demo import vision

for settings in (vision._ALONE, vision._SEVERAL):
    settings["num_photos"] = 8
vision.get_context = lambda kind: multiprocessing.get_context("fork")
(accuracy,) = vision.train_branches(Path(sys.argv[1]), steps=(1,), num_val=32)
print(accuracy)
"""


@pytest.fixture(scope="module", autouse=True)
def few_photographs():
    """Cuts 8 pieces of photographs instead of 600, which takes longer than the short trainings."""
    with pytest.MonkeyPatch.context() as patch:
        for settings in (vision._ALONE, vision._SEVERAL):
            patch.setitem(settings, "num_photos", 8)
        yield


@pytest.fixture(scope="module")
def trained(few_photographs, tmp_path_factory):
    """The folder of branches after an update of Branch 1 and three of Branch 2, and their accuracies."""
    folder = tmp_path_factory.mktemp("vision")
    with limited_threads(1):
        return folder, [vision._train_branch(folder, number, steps, num_val=32) for number, steps in ((1, 1), (2, 3))]


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


# ---- The branches ----


def test_the_pyramid_is_inverted_and_gives_16_tokens():
    pyramid = PIIP(vision.CHAT_PYRAMID).eval()
    large, small = (sum(p.numel() for p in branch.parameters()) for branch in pyramid.branches)
    assert large > small
    assert [branch.image_size for branch in vision.CHAT_PYRAMID.branches] == [64, CHAT_SCENES.image_size]
    maps = pyramid(torch.zeros(2, 3, CHAT_SCENES.image_size, CHAT_SCENES.image_size))
    assert maps[-1].shape[2:] == (4, 4)


def test_trained_weights_reach_the_pyramid_as_any_pretrained_ones(trained):
    folder, accuracies = trained
    assert len(accuracies) == 2 and all(0 <= accuracy <= 1 for accuracy in accuracies)
    pyramid = PIIP(vision.chat_pyramid(folder))
    reports = load_pretrained(pyramid)
    for number, branch in enumerate(pyramid.branches, 1):
        assert not reports[number].missing and not reports[number].ignored and not reports[number].unexplained
        state, saved = branch.model.state_dict(), load_file(folder / f"branch{number}.safetensors")
        assert state.keys() == saved.keys()
        assert all(torch.equal(state[name], saved[name]) for name in saved)


def test_training_starts_and_ends_the_same_every_time(trained, tmp_path):
    with limited_threads(1):  # the order of sums depends on it
        again = vision._train_branch(tmp_path, 2, 3, num_val=32)
    assert again == trained[1][1]
    first, second = (load_file(folder / "branch2.safetensors") for folder in (trained[0], tmp_path))
    assert all(torch.allclose(first[name], second[name], atol=1e-6) for name in first)


def test_branches_are_taught_by_processes(run_python, trained, tmp_path):
    done = run_python(TEACH, str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert 0 <= float(done.stdout) <= 1
    first, second = (load_file(folder / "branch1.safetensors") for folder in (trained[0], tmp_path))
    assert first.keys() == second.keys()


@pytest.mark.parametrize("loss", [vision._loss_alone, vision._loss_of_cells])
def test_losses_vanish_for_right_answers_alone(loss):
    composer = DigitComposer("val", **(vision._ALONE if loss is vision._loss_alone else vision._SEVERAL))
    batch = composer.batch(8, torch.Generator().manual_seed(0))
    digits, colours = vision._cell_targets(batch, 4)
    digit = 30 * torch.nn.functional.one_hot(digits, vision._NO_DIGIT + 1).float()
    colour = 30 * torch.nn.functional.one_hot(colours.clamp_min(0), len(NAMED_COLOURS)).float()
    assert loss(digit, colour, batch) < 1e-3
    assert loss(digit.roll(1, dims=3), colour, batch) > 5
    assert loss(digit, colour.roll(1, dims=3), batch) > 5


def test_the_branch_learns_from_what_the_processor_of_the_chat_makes():
    pixels = torch.randint(0, 256, (128, 128, 3), dtype=torch.uint8)
    processor = PIIPImageProcessor(size=128, image_mean=vision.PIXEL_MEAN, image_std=vision.PIXEL_STD)
    expected = processor(images=[Image.fromarray(pixels.numpy())], return_tensors="pt")["pixel_values"]
    seen = []
    model = vision.DigitTeacher(vision.CHAT_PYRAMID.branches[1])
    model.branch.model.stem.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    model(pixels.permute(2, 0, 1)[None] / 255)
    assert torch.allclose(seen[0], expected, atol=1e-6)
