"""What the demo tells of the trained model: answers in batches, scores counted by hand, dialogues drawn."""

import numpy as np
import pytest
from matplotlib.colors import to_rgb
from PIL import Image

from llava_piip.demo import results
from llava_piip.demo.questions import Question
from llava_piip.demo.results import answer_all, draw_dialogues, format_scores, is_right, score
from llava_piip.inference import ChatModel


@pytest.fixture
def images(tmp_path):
    for number in range(3):
        Image.new("RGB", (64, 64), (80 * number, 40, 200)).save(tmp_path / f"{number}.png")
    return [tmp_path / f"{number}.png" for number in range(3)]


def test_batches_answer_as_single_questions_do(tiny_llava, images):
    chat = ChatModel(*tiny_llava)
    questions = [
        Question("which", "Which digit?", "1", "0.png"),
        Question("text", "What is 1 + 1, by the way?", "2"),
        Question("count", "How many?", "1", "1.png"),
        Question("where", "Where in the picture is it?", "left", "2.png"),
    ]
    root = images[0].parent
    together = answer_all(chat, questions, root, batch_size=3)
    assert together == [answer_all(chat, [question], root)[0] for question in questions]
    assert len(set(together)) > 1


def colour(text, answer):
    return Question("colour", text, answer, "1.jpg")


TRAINING = [
    *[colour("What colour is the 1?", "red")] * 3,
    *[colour("What colour is the 1?", "blue")] * 2,
    *[colour("What colour is the 2?", "green")] * 2,
    colour("What colour is the 2?", "red"),
    *[Question("count", "How many?", "1", "1.jpg")] * 2,
    Question("count", "How many?", "2", "1.jpg"),
    Question("text", "What is 1 + 1?", "2"),
]


def test_accuracy_per_type():
    asked = [
        colour("What colour is the 1?", "red"),
        Question("count", "How many?", "3"),
        colour("What colour is the 2?", "red"),
    ]
    found = score(asked, [" red\n", "3", "Red"], TRAINING)
    assert [(entry.type, entry.count, entry.accuracy) for entry in found] == [("count", 1, 1.0), ("colour", 2, 0.5)]


def test_only_the_whole_answer_is_right():
    question = Question("where", "Where is the 7?", "top left")
    assert is_right(question, "top left") and is_right(question, " top left\n")
    for wrong in ("top", "Top left", "top left.", "the top left", ""):
        assert not is_right(question, wrong)


@pytest.mark.parametrize(
    ("truth", "baseline"),
    [
        (("red", "green"), 1.0),  # each the most frequent to its own words
        (("red", "red"), 1.0),  # red is the most frequent of all colours
        (("blue", "green"), 0.5),
        (("blue", "pink"), 0.0),
    ],
)
def test_the_better_constant_is_the_baseline(truth, baseline):
    asked = [colour(f"What colour is the {digit}?", answer) for digit, answer in zip((1, 2), truth, strict=True)]
    assert score(asked, ["white"] * 2, TRAINING)[0].baseline == baseline


def test_words_that_training_did_not_use():
    asked = [
        colour("What colour is the 9?", "red"),
        Question("text", "What is 2 + 0?", "2"),
        Question("sum", "Sum?", "4"),
    ]
    found = score(asked, ["", "", ""], TRAINING)
    # The most frequent answer of the type, and nothing where training had no such type
    assert {entry.type: entry.baseline for entry in found} == {"colour": 1.0, "text": 1.0, "sum": 0.0}


def test_the_order_of_training_does_not_matter():
    asked = [colour("What colour is the 3?", "red")]
    tied = [colour("What colour is the 3?", "red"), colour("What colour is the 3?", "blue")]
    assert score(asked, [""], tied) == score(asked, [""], tied[::-1])


def test_table():
    asked = [Question("count", "How many?", answer) for answer in ("1", "2", "3", "1")]
    lines = format_scores(score(asked, ["1", "2", "3", "3"], TRAINING)).splitlines()
    assert lines[0].split() == ["question", "type", "asked", "accuracy", "baseline"]
    assert lines[1].split() == ["count", "4", "75.0%", "50.0%"]
    assert len(lines[0]) == len(lines[1])


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
    assert count(right, results.RIGHT) > 50 and count(right, results.WRONG) == 0
    assert count(wrong, results.WRONG) > 50 and count(wrong, results.RIGHT) == 0


def test_the_image_is_beside_its_dialogue(tmp_path, blue_image):
    pixels = pixels_of(tmp_path / "a.png", [(blue_image, [(QUESTION, "7")])])
    blue = np.abs(pixels - (0, 0, 255)).max(axis=-1) < 8
    green = np.abs(pixels - np.array([255 * part for part in to_rgb(results.RIGHT)])).max(axis=-1) < 40
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
