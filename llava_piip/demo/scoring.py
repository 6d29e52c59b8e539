"""Exact-match accuracy per type of question, beside what answering without looking would give."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

from .questions import QUESTION_TYPES, Question

__all__ = ["TypeScore", "format_scores", "is_right", "score"]


class TypeScore(NamedTuple):
    """How many questions of a type were asked, and the parts that model and baseline answered exactly right."""

    type: str
    count: int
    accuracy: float
    baseline: float


def is_right(question: Question, answer: str) -> bool:
    """Whether an answer is exactly the right one; only white space around it does not count."""
    return answer.strip() == question.answer


def score(questions: Sequence[Question], answers: Sequence[str], training: Iterable[Question]) -> list[TypeScore]:
    """Compares answers with the right ones, for each type that was asked.

    The baseline always gives the most frequent answer of training: to the same words, where training asked them, or to
    all questions of the type. Whichever of the two comes out better counts.

    Raises:
        ValueError: If there are not as many answers as questions.
    """
    if len(questions) != len(answers):
        raise ValueError(f"{len(answers)} answers to {len(questions)} questions: expected one for each")
    training = list(training)
    by_type = _most_frequent(training, lambda question: question.type)
    by_words = _most_frequent(training, lambda question: question.text)
    scores = []
    for kind in QUESTION_TYPES:
        asked = [pair for pair in zip(questions, answers, strict=True) if pair[0].type == kind]
        constant = by_type.get(kind, "")
        guesses = (
            [(question, constant) for question, _ in asked],
            [(question, by_words.get(question.text, constant)) for question, _ in asked],
        )
        if asked:
            scores.append(TypeScore(kind, len(asked), _accuracy(asked), max(map(_accuracy, guesses))))
    return scores


def format_scores(scores: Sequence[TypeScore]) -> str:
    """The scores as a table to print, in percent."""
    lines = [f"{'question type':<14}{'asked':>6}{'accuracy':>10}{'baseline':>10}"]
    lines += [f"{entry.type:<14}{entry.count:6}{entry.accuracy:10.1%}{entry.baseline:10.1%}" for entry in scores]
    lines.append("(baseline: always the most frequent training answer to the question as it is worded, or to its type)")
    return "\n".join(lines)


def _accuracy(answered: Sequence[tuple[Question, str]]) -> float:
    return sum(is_right(question, answer) for question, answer in answered) / len(answered)


def _most_frequent(questions: Iterable[Question], key: Callable[[Question], str]) -> dict[str, str]:
    """The most frequent answer per key; of equally frequent ones, the first in the alphabet."""
    counts: dict[str, Counter[str]] = {}
    for question in questions:
        counts.setdefault(key(question), Counter())[question.answer] += 1
    return {name: min(counter, key=lambda answer: (-counter[answer], answer)) for name, counter in counts.items()}
