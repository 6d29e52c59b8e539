"""Captions of digit scenes, and questions about them with their answers.

Everything is made from what is known of a scene (`SeenDigit`), so the same sentences can be written about scenes that
were never drawn: the language model learns from those.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from random import Random
from string import ascii_lowercase

from piip_digits.scenes import NAMED_COLOURS, NUM_CLASSES, Scene, SceneConfig, render_scene

CHAT_SCENES = SceneConfig(
    image_size=128,
    min_digits=1,
    max_digits=3,
    min_digit_size=38,
    max_digit_size=52,
    min_visible=1.0,
    palette=NAMED_COLOURS,
    all_different=True,
    middle_margin=1 / 24,  # nearer to a middle line, people would not agree on the place of a digit
)
"""What the scenes of the chat look like."""

PLACES = ("top left", "top right", "bottom left", "bottom right")
DESCRIBE = "Describe the picture."

_NUMBERS = (1, 2, 1, 2, 3)  # digits of one scene after the other
_CELLS = 4  # along each side of an image in words
_MAX_DRAWS = 8  # scenes drawn for one with room for all of its digits

_WORDINGS = {
    "which": ("Which digit is it?", "Which digit is in the picture?", "What digit do you see?"),
    "count": ("How many digits are there?", "How many digits are in the picture?", "How many digits do you see?"),
    "where": ("Where is the {digit}?", "Where in the picture is the {digit}?", "Where do you see the {digit}?"),
    "colour": ("What colour is the {digit}?", "What colour does the {digit} have?", "Which colour is the {digit}?"),
    "sum": ("What is the sum of the digits?", "What do the digits add up to?", "How much are the digits together?"),
    "text": ("What is {sum}?", "How much is {sum}?"),
}
QUESTION_TYPES = tuple(_WORDINGS)
"""All types of questions: about one digit, about all digits, and (`text`) about no image."""


@dataclass(frozen=True)
class Question:
    """A question with its answer."""

    type: str  # one of `QUESTION_TYPES`
    text: str
    answer: str  # the only right one: a number in digits, a place or a colour
    image: str | None = None  # file name relative to the data set; None for a question without an image


@dataclass(frozen=True)
class SeenDigit:
    """What can be said about a digit of a scene; `place` is the one of `PLACES` where the centre of its box is."""

    label: int
    colour: str
    place: str


def render_chat_scene(split: str, index: int) -> Scene:
    """Draws a scene of the chat: of five in a row, two have one digit, two have two and one has three."""
    number = _NUMBERS[index % len(_NUMBERS)]
    config = replace(CHAT_SCENES, min_digits=number, max_digits=number)
    for attempt in range(_MAX_DRAWS):
        scene = render_scene(config, split, index * _MAX_DRAWS + attempt)
        if len(scene.digits) == number:  # fewer where there was no room for all
            return scene
    raise RuntimeError(f"{split} scene {index}: no room for {number} digits in {_MAX_DRAWS} tries; make them smaller")


def seen_digits(scene: Scene) -> list[SeenDigit]:
    """What there is to say about a scene, in reading order: the upper half from left to right, then the lower one."""
    height, width = scene.image.shape[:2]
    found = []
    for digit in scene.digits:
        x, y, box_width, box_height = digit.box
        right, low = x + box_width / 2, y + box_height / 2 >= height / 2
        place = PLACES[2 * low + (right >= width / 2)]
        found.append((low, right, SeenDigit(digit.label, str(digit.colour), place)))
    return [digit for *_, digit in sorted(found, key=lambda entry: entry[:2])]


def imagine(rng: Random) -> list[SeenDigit]:
    """Digits as a scene could have them, in reading order."""
    number = rng.choice(_NUMBERS)
    labels = rng.sample(range(NUM_CLASSES), number)
    colours = rng.sample([name for name, _ in NAMED_COLOURS], number)
    places = sorted(rng.choices(range(len(PLACES)), k=number))
    return [SeenDigit(*known, PLACES[place]) for *known, place in zip(labels, colours, places, strict=True)]


def caption(digits: Sequence[SeenDigit]) -> str:
    """The scene in words: "a red 7 at the top left, a white 0 at the top right and a blue 3 at the bottom right"."""
    *parts, last = (f"a {digit.colour} {digit.label} at the {digit.place}" for digit in digits)
    return f"{', '.join(parts)} and {last}" if parts else last


def in_words(digits: Sequence[SeenDigit], rng: Random) -> str:
    """The scene as an image in words, of 4 x 4 cells row by row: "a b c d e red7 g h ... p".

    The language model learns to read these, and later the projector to write what it reads. Letters name the empty
    cells, for a small model cannot count. Each digit is in a random cell of its quarter.
    """
    cells = list(ascii_lowercase[: _CELLS**2])
    for digit in digits:
        down, right = divmod(PLACES.index(digit.place), 2)
        corner = 2 * _CELLS * down + 2 * right
        quarter = [corner, corner + 1, corner + _CELLS, corner + _CELLS + 1]
        free = [cell for cell in quarter if len(cells[cell]) == 1]
        cells[rng.choice(free)] = f"{digit.colour}{digit.label}"
    return " ".join(cells)


def ask_round_by_round(digits: Sequence[SeenDigit], rng: Random) -> list[Question]:
    """Four or five questions (fewer where a scene gives no more) for one conversation.

    None of them gives away the answer of a later one.

    Questions such as "Where is the 7?" tell that there is a 7, and others whether there are several digits. So "how
    many" is asked first and the sum next, if they are asked at all, and a single digit is named by no question.
    """
    rounds = rng.choice((4, 5))
    single = len(digits) == 1
    asked = [
        _ask(kind, digits, rng) for kind in (["count", "sum"] if len(digits) == 2 else ["count"]) if rng.random() < 0.5
    ]
    details = [(kind, digit) for kind in ("where", "colour") for digit in digits]
    if single:
        details.append(("which", digits[0]))
    rng.shuffle(details)
    named = not single
    for kind, digit in details[: rounds - len(asked)]:
        asked.append(_ask(kind, [digit], rng, named=named))
        named |= kind == "which"
    return asked


def ask_all(digits: Sequence[SeenDigit], rng: Random) -> list[Question]:
    """One question of every type that suits the scene, each for a conversation of its own."""
    single = len(digits) == 1
    kinds = {1: ("which", "count"), 2: ("count", "sum")}.get(len(digits), ("count",))
    about_all = [_ask(kind, digits, rng) for kind in kinds]
    return about_all + [_ask(kind, [rng.choice(digits)], rng, named=not single) for kind in ("where", "colour")]


def ask_sums(rng: Random, count: int) -> list[Question]:
    """Questions without an image, such as "What is 3 + 4?", for one conversation."""
    asked = []
    for _ in range(count):
        first, second = rng.randrange(NUM_CLASSES), rng.randrange(NUM_CLASSES)
        text = rng.choice(_WORDINGS["text"]).format(sum=f"{first} + {second}")
        asked.append(Question("text", text, str(first + second)))
    return asked


def _ask(kind: str, digits: Sequence[SeenDigit], rng: Random, *, named: bool = False) -> Question:
    """A question about all of the digits, or about the only one, which the question may call by its name."""
    answers = {
        "which": digits[0].label,
        "count": len(digits),
        "where": digits[0].place,
        "colour": digits[0].colour,
        "sum": sum(digit.label for digit in digits),
    }
    text = rng.choice(_WORDINGS[kind]).format(digit=digits[0].label if named else "digit")
    return Question(kind, text, str(answers[kind]))
