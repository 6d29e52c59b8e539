"""Captions, questions and answers: true to the image, complete, and none that gives away a later answer."""

import re
from collections import Counter
from dataclasses import replace
from random import Random

import numpy as np
import pytest
from scipy.ndimage import binary_erosion
from sklearn.datasets import load_digits

from llava_piip.demo import questions
from llava_piip.demo.questions import (
    PLACES,
    QUESTION_TYPES,
    ask_all,
    ask_round_by_round,
    caption,
    imagine,
    in_words,
    render_chat_scene,
    seen_digits,
)
from piip_digits.scenes import NAMED_COLOURS


@pytest.fixture(scope="module")
def scenes():
    return [render_chat_scene(split, index) for split in ("train", "val") for index in range(25)]


def answer_from_caption(text, question):
    """Reads both texts and answers, as somebody would who only has the caption."""
    known = [(int(label), colour, place) for colour, label, place in re.findall(r"a (\w+) (\d) at the (\w+ \w+)", text)]
    named = re.search(r"the (\d)", question)
    about = [entry for entry in known if named is None or entry[0] == int(named[1])]
    if "How many" in question:
        return str(len(known))
    if re.search("sum|add up|together", question):
        return str(sum(label for label, *_ in known))
    assert len(about) == 1, (text, question)
    if re.search("[Ww]here", question):
        return about[0][2]
    return about[0][1] if "colour" in question else str(about[0][0])


def test_what_is_said_about_a_scene_is_in_its_pixels(scenes):
    target, colours = load_digits().target, dict(NAMED_COLOURS)
    for scene in scenes:
        said = seen_digits(scene)
        assert len({digit.label for digit in said}) == len(said) == len(scene.digits)
        for digit in scene.digits:
            (known,) = [entry for entry in said if entry.label == target[digit.sample]]
            rows, columns = np.nonzero(digit.mask)
            low, right = rows.min() + rows.max() >= 127, columns.min() + columns.max() >= 127
            assert known.place == f"{'bottom' if low else 'top'} {'right' if right else 'left'}"
            # Nobody needs to measure: the digit does not sit on a middle line
            assert min(abs(rows.min() + rows.max() - 127), abs(columns.min() + columns.max() - 127)) / 2 > 4
            paint = np.median(scene.image[binary_erosion(digit.mask, iterations=3)], axis=0) / 255
            nearest = min(colours, key=lambda name: np.abs(paint - colours[name]).max())
            assert nearest == known.colour and np.abs(paint - colours[nearest]).max() < 0.15
        order = [PLACES.index(digit.place) // 2 for digit in said]
        assert order == sorted(order)


def test_scenes_without_room_are_an_error(monkeypatch):
    crowded = replace(questions.CHAT_SCENES, min_digit_size=80, max_digit_size=84)
    monkeypatch.setattr(questions, "CHAT_SCENES", crowded)
    with pytest.raises(RuntimeError, match="val scene 4: no room for 3 digits"):
        render_chat_scene("val", 4)


def test_imagined_digits_are_such_as_scenes_have(scenes):
    rng = Random(0)
    imagined = [imagine(rng) for _ in range(2000)]
    for digits in imagined:
        assert len({digit.label for digit in digits}) == len({digit.colour for digit in digits}) == len(digits)
        assert [digit.place for digit in digits] == sorted((digit.place for digit in digits), key=PLACES.index)
    numbers = Counter(map(len, imagined))
    assert set(numbers) == {1, 2, 3} and abs(numbers[1] / 2000 - 0.4) < 0.05
    for seen in (imagined, [seen_digits(scene) for scene in scenes]):
        everything = [digit for digits in seen for digit in digits]
        assert {digit.label for digit in everything} == set(range(10))
        assert {digit.colour for digit in everything} == {name for name, _ in NAMED_COLOURS}
        assert {digit.place for digit in everything} == set(PLACES)


def test_every_answer_can_be_read_from_the_caption():
    rng = Random(1)
    asked = Counter()
    for _ in range(1500):
        digits = imagine(rng)
        for question in ask_round_by_round(digits, rng) + ask_all(digits, rng):
            assert answer_from_caption(caption(digits), question.text) == question.answer
            asked[question.type, question.text] += 1
    assert {kind for kind, _ in asked} == set(QUESTION_TYPES) - {"text"}
    assert not any("{" in text for _, text in asked)
    assert len({text for kind, text in asked if kind == "where"}) == 3 * 11  # wordings of "the digit", "the 0", ...


def test_no_round_gives_away_a_later_answer():
    rng = Random(2)
    first = {1: Counter(), 2: Counter(), 3: Counter()}
    for _ in range(3000):
        digits = imagine(rng)
        rounds = ask_round_by_round(digits, rng)
        assert 3 <= len(rounds) <= 5
        first[len(digits)][rounds[0].type] += 1
        topics = [(question.type, "".join(re.findall(r"\d", question.text))) for question in rounds]
        assert len(digits) > 1 or [kind for kind, _ in topics].count("where") <= 1
        before = ""
        for number, (question, (kind, name)) in enumerate(zip(rounds, topics, strict=True)):
            if kind == "count":  # any question tells whether there are several digits
                assert number == 0
            if kind in ("which", "sum"):
                assert not re.search(r"the \d", before)
            if kind in ("where", "colour"):
                earlier = [(other, said) for other, said in topics[:number] if other == kind]
                assert name not in [said for _, said in earlier] and (len(digits) > 1 or not earlier)
                known = len(digits) > 1 or "which" in [other for other, _ in topics[:number]]
                assert bool(name) == known  # "the 7" where that tells nothing new, else "the digit"
            before += f"{question.text} {question.answer}\n"
    # Whatever validation asks by itself also comes first in training, now and then
    assert min(first[1][kind] for kind in ("which", "count", "where", "colour")) > 100
    assert min(first[2][kind] for kind in ("sum", "count", "where", "colour")) > 100
    assert min(first[3][kind] for kind in ("count", "where", "colour")) > 100 and not first[3]["sum"]


def test_an_image_in_words_has_every_digit_in_its_quarter():
    rng = Random(6)
    cells = Counter()
    for _ in range(500):
        digits = imagine(rng)
        words = in_words(digits, rng).split(" ")
        assert len(words) == 16
        found = []
        for number, word in enumerate(words):
            if match := re.fullmatch(r"([a-z]{3,})(\d)", word):
                row, column = divmod(number, 4)
                place = f"{'bottom' if row > 1 else 'top'} {'right' if column > 1 else 'left'}"
                found.append((int(match[2]), match[1], place))
                cells[number] += 1
            else:
                assert word == "abcdefghijklmnop"[number]
        assert sorted(found) == sorted((digit.label, digit.colour, digit.place) for digit in digits)
    assert len(cells) == 16
