"""How VQA benchmarks make answers comparable: TextVQA's local scoring, and VQAv2's submissions."""

from __future__ import annotations

import re
from functools import cache

__all__ = ["normalized"]

_MARKS = ';/[]"{}()=+\\_-><@`!'
_PERIOD = re.compile(r"\.(?!\d)")
_MOST_PERIODS = 32  # the public scripts hand a flag (re.UNICODE) to re.sub where it takes a count
_ARTICLES = ("a", "an", "the")
_DIGITS = "zero one two three four five six seven eight nine ten".split()
_NUMBERS = {"none": "0"} | {word: str(value) for value, word in enumerate(_DIGITS)}

# Contractions that are completed where one apostrophe is missing. In the official table those of I are written with a
# capital, and never match lower-case text.
_NOT = "ai are ca could did does do had has have is might must need ought sha should was were wo would"
_TARGETS = (
    *(f"{word}n't" for word in _NOT.split()),
    *(f"{word}n't've" for word in "could had might should would".split()),
    *(f"{word}'ve" for word in "could might must not should they we what where who would you".split()),
    *(f"{word}'d've" for word in "he it she somebody someone something there they we who y'all you".split()),
    *(f"{word}'d" for word in "he how it someone something there they where who you".split()),
    *(f"{word}'ll" for word in "how it somebody someone something they what who why y'all you".split()),
    *(f"{word}'s" for word in "he how somebody someone that there what when where who why".split()),
    *(f"{word}'re" for word in "there they what why you".split()),
    *("ma'am", "o'clock", "'twas", "y'all", "'ow's'at"),
)


def normalized(text: str) -> str:
    """An answer as it is compared: lower case, without punctuation and articles, numbers as digits.

    Follows the official evaluation of VQA as TextVQA uses it, with its peculiarities: a mark is removed where it stands
    next to a space anywhere in the text and becomes a space otherwise, and only the first 32 periods are removed.
    """
    text = text.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip()
    text = text.replace("\n", " ").replace("\t", " ")
    marked = text
    for mark in _MARKS:
        beside_space = f"{mark} " in marked or f" {mark}" in marked
        text = text.replace(mark, "" if beside_space else " ")
    text = _PERIOD.sub("", text, count=_MOST_PERIODS)
    words = (_NUMBERS.get(word, word) for word in text.lower().split())
    return " ".join(_contractions().get(word, word) for word in words if word not in _ARTICLES)


@cache
def _contractions() -> dict[str, str]:
    """Spellings with one apostrophe missing, and what they become."""
    table = {}
    for target in _TARGETS:
        for place, character in enumerate(target):
            if character == "'":
                table[target[:place] + target[place + 1 :]] = target
    # The official table has this one the other way round
    table["somebody'd"] = "somebodyd"
    return table
