"""Dialogues drawn beside their images: what is right is green, what is wrong red."""

import numpy as np
import pytest
from matplotlib.colors import to_rgb
from PIL import Image

from llava_piip.demo import drawing
from llava_piip.demo.drawing import draw_dialogues
from llava_piip.demo.questions import Question

QUESTION = Question("which", "Which digit is it?", "7", "1.png")


@pytest.fixture
def blue_image(tmp_path):
    path = tmp_path / "1.png"
    Image.new("RGB", (128, 128), (0, 0, 255)).save(path)
    return path


def pixels_of(path, dialogues, **settings):
    draw_dialogues(path, dialogues, **settings)
    with Image.open(path) as picture:
        assert picture.format == "PNG"
        return np.asarray(picture.convert("RGB"), dtype=int)


def count(pixels, colour):
    return int((np.abs(pixels - np.array([255 * part for part in to_rgb(colour)])).max(axis=-1) < 40).sum())


def test_colours_tell_right_from_wrong(tmp_path, blue_image):
    right = pixels_of(tmp_path / "a.png", [(blue_image, [(QUESTION, "7")])])
    wrong = pixels_of(tmp_path / "b.png", [(blue_image, [(QUESTION, "1")])])
    assert count(right, drawing._RIGHT) > 50 and count(right, drawing._WRONG) == 0
    assert count(wrong, drawing._WRONG) > 50 and count(wrong, drawing._RIGHT) == 0


def test_the_image_is_beside_its_dialogue(tmp_path, blue_image):
    pixels = pixels_of(tmp_path / "a.png", [(blue_image, [(QUESTION, "7")])])
    blue = np.abs(pixels - (0, 0, 255)).max(axis=-1) < 8
    green = np.abs(pixels - np.array([255 * part for part in to_rgb(drawing._RIGHT)])).max(axis=-1) < 40
    assert blue.sum() > 20_000 and np.flatnonzero(blue.any(axis=0)).max() < np.flatnonzero(green.any(axis=0)).min()


def test_each_dialogue_has_a_panel(tmp_path, blue_image):
    one = pixels_of(tmp_path / "1.png", [(blue_image, [(QUESTION, "7")])])
    three = pixels_of(tmp_path / "3.png", [(blue_image, [(QUESTION, "7")])] * 3, title="Three")
    assert three.shape[0] > 1.8 * one.shape[0] and three.shape[1] > 1.8 * one.shape[1]


def test_answers_that_are_hard_to_draw(tmp_path, blue_image):
    rounds = [(QUESTION, "long " * 50), (QUESTION, ""), (QUESTION, "a\nb $x_$ 7"), (QUESTION, "7"), (QUESTION, "7")]
    pixels = pixels_of(tmp_path / "a.png", [(blue_image, rounds), (blue_image, rounds[:1])])
    margin = pixels[:, -4:]
    assert (margin == 255).all()  # nothing runs over the edge
