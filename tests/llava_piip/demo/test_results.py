"""What the demo tells of the trained model: answers in batches, and scores counted by hand."""

import pytest
from PIL import Image

from llava_piip.demo.__main__ import answer_all, format_scores, is_right, score
from llava_piip.demo.questions import Question
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


def test_table():
    asked = [Question("count", "How many?", answer) for answer in ("1", "2", "3", "1")]
    lines = format_scores(score(asked, ["1", "2", "3", "3"], TRAINING)).splitlines()
    assert lines[0].split() == ["question", "type", "asked", "accuracy", "baseline"]
    assert lines[1].split() == ["count", "4", "75.0%", "50.0%"]
    assert len(lines[0]) == len(lines[1])
