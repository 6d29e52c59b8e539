"""The branches of the small chat model: they learn on images like those of the chat, and their weights arrive."""

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from llava_piip.demo import vision
from llava_piip.demo.questions import CHAT_SCENES
from llava_piip.image_processing import PIIPImageProcessor
from piip_core import PIIP
from piip_core.checkpoints import load_pretrained
from piip_digits.composer import DigitComposer
from piip_digits.scenes import NAMED_COLOURS
from piip_tools.timing import limited_threads


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
