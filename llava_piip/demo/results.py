"""What the trained model answers, and its accuracy beside that of not looking."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from PIL import Image
from tabulate import tabulate
from tqdm import tqdm

from ..conversation import IMAGE_TAG, Messages
from ..data.images import read_image
from ..inference import ChatModel
from .questions import QUESTION_TYPES, Question

MOST_TOKENS = 48


class TypeScore(NamedTuple):
    """How many questions of a type were asked, and the parts that model and baseline answered exactly right."""

    type: str
    count: int
    accuracy: float
    baseline: float


def answer_all(chat: ChatModel, questions: Sequence[Question], image_root: Path, *, batch_size: int = 64) -> list[str]:
    """Answers questions, each in a conversation of its own, in batches and without sampling."""
    answers: list[str] = []
    for first in tqdm(range(0, len(questions), batch_size), desc="Answers", unit="batch"):
        batch = [_conversation(question, image_root) for question in questions[first : first + batch_size]]
        answers += chat.answer(batch, max_new_tokens=MOST_TOKENS)
    return answers


def _conversation(question: Question, image_root: Path) -> tuple[Messages, list[Image.Image]]:
    if question.image is None:
        return [{"role": "user", "content": question.text}], []
    image = read_image(image_root / question.image, question.image, as_viewed=True)
    return [{"role": "user", "content": f"{IMAGE_TAG}\n{question.text}"}], [image]


def is_right(question: Question, answer: str) -> bool:
    """Whether an answer is exactly the right one; only white space around it does not count."""
    return answer.strip() == question.answer


def score(questions: Sequence[Question], answers: Sequence[str], training: Iterable[Question]) -> list[TypeScore]:
    """Compares answers with the right ones, for each type that was asked.

    The baseline always gives the most frequent answer of training: to the same words, where training asked them, or to
    all questions of the type. Whichever of the two comes out better counts.
    """
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    for question in training:
        counts[question.type][question.answer] += 1
        counts[question.text][question.answer] += 1
    # Of equally frequent answers, the first in the alphabet
    common = {key: min(counter, key=lambda a, c=counter: (-c[a], a)) for key, counter in counts.items()}
    scores = []
    for kind in QUESTION_TYPES:
        asked = [pair for pair in zip(questions, answers, strict=True) if pair[0].type == kind]
        constant = common.get(kind, "")
        by_type = [(question, constant) for question, _ in asked]
        by_words = [(question, common.get(question.text, constant)) for question, _ in asked]
        if asked:
            scores.append(TypeScore(kind, len(asked), _accuracy(asked), max(_accuracy(by_type), _accuracy(by_words))))
    return scores


def format_scores(scores: Sequence[TypeScore]) -> str:
    """The scores as a table to print, in percent."""
    rows = [(entry.type, entry.count, f"{entry.accuracy:.1%}", f"{entry.baseline:.1%}") for entry in scores]
    header = ("question type", "asked", "accuracy", "baseline")
    table = tabulate(rows, header, "plain", disable_numparse=True, colalign=("left", "right", "right", "right"))
    return f"{table}\n(baseline: always the most frequent training answer to the question as worded, or to its type)"


def _accuracy(answered: Sequence[tuple[Question, str]]) -> float:
    return sum(is_right(question, answer) for question, answer in answered) / len(answered)
