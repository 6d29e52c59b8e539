"""Accuracy and baseline against numbers counted by hand."""

import pytest

from llava_piip.demo.questions import Question
from llava_piip.demo.scoring import format_scores, is_right, score


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


def test_a_missing_answer_is_not_scored_silently():
    with pytest.raises(ValueError, match="1 answers to 2 questions"):
        score([colour("a", "red"), colour("b", "red")], ["red"], TRAINING)


def test_table():
    asked = [Question("count", "How many?", answer) for answer in ("1", "2", "3", "1")]
    lines = format_scores(score(asked, ["1", "2", "3", "3"], TRAINING)).splitlines()
    assert lines[0].split() == ["question", "type", "asked", "accuracy", "baseline"]
    assert lines[1].split() == ["count", "4", "75.0%", "50.0%"]
    assert len(lines[0]) == len(lines[1])
