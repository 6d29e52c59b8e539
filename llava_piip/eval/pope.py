"""POPE: is an object in the picture? Three ways of choosing the objects that are not."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path

from .benchmark import Answer, Benchmark, Score, last_answers, read_llava_questions
from .files import EvalError, field, read_json_lines

__all__ = ["POPE", "yes_or_no"]

_CATEGORIES = ("adversarial", "popular", "random")
_LABELS = {category: f"coco/coco_pope_{category}.json" for category in _CATEGORIES}
_NO = ("No", "not", "no")


def yes_or_no(text: str) -> str:
    """What an answer says: "no" if its first sentence has the word No, not or no, otherwise "yes"."""
    words = text.partition(".")[0].replace(",", "").split(" ")
    return "no" if any(word in _NO for word in words) else "yes"


def _score(questions_file: Path, answers: Sequence[Answer]) -> Score:
    """Compares with the labels, question by question.

    The public script pairs the answers of a category with the labels by their order in the file, takes every label but
    "no" for yes, and its summary drops the last digit of each F1, rounds it, and then takes the mean.
    """
    questions = read_llava_questions(questions_file)
    categories = {question.id: question.category for question in questions}
    known = last_answers(answers)
    details, public_details = {}, {}
    for category in dict.fromkeys(question.category for question in questions):
        if category not in _LABELS:
            raise EvalError(f"{questions_file}: category {category!r}; expected {', '.join(_CATEGORIES)}")
        labels = _read_labels(questions_file.parent / _LABELS[category])
        asked = [question for question in questions if question.category == category]
        if len(labels) != len(asked):
            raise EvalError(
                f"{questions_file}: {len(asked)} questions of category {category!r}, but {len(labels)} labels in "
                f"{_LABELS[category]}: they belong to different versions of the benchmark"
            )
        pairs = zip(labels, asked, strict=True)
        details[category] = _metrics(
            (label.lower(), known[question.id].text) for label, question in pairs if question.id in known
        )
        in_order = [answer.text for answer in answers if categories.get(answer.id) == category]
        public_labels = ("no" if label == "no" else "yes" for label in labels)
        public_details[category] = _metrics(zip(public_labels, in_order, strict=False))
    value = 100 * sum(found["F1 score"] for found in details.values()) / len(details)
    lines = []
    for category, found in details.items():
        numbers = ", ".join(f"{name} {found[name]:.3f}" for name in _PRINTED)
        lines.append(f"{category}: {found['n']} answers, {numbers}")
    public = _public_summary([found["F1 score"] for found in public_details.values()])
    note = "pairs answers with labels by their order, and rounds each F1 after dropping its last digit"
    return Score(value, lines, {**details, "public": public_details}, public, note)


_PRINTED = ("Accuracy", "Precision", "Recall", "F1 score", "Yes ratio")


def _read_labels(path: Path) -> list[str]:
    labels = []
    for number, entry in read_json_lines(path):
        label = field(entry, "label", str, f"{path}: line {number}")
        if label.lower() not in ("yes", "no"):
            raise EvalError(f"{path}: line {number}: label {label!r}, expected yes or no")
        labels.append(label)
    return labels


def _metrics(pairs: Iterable[tuple[str, str]]) -> dict[str, float]:
    """Counts and measures of (label, text of the answer); yes is positive, and what cannot be divided is 0."""
    counts: dict[tuple[str, str], int] = defaultdict(int)
    for label, text in pairs:
        counts[label, yes_or_no(text)] += 1
    tp, fp, tn, fn = (counts[pair] for pair in (("yes", "yes"), ("no", "yes"), ("no", "no"), ("yes", "no")))
    n = tp + fp + tn + fn
    precision, recall = tp / max(tp + fp, 1), tp / max(tp + fn, 1)
    return {
        "n": n,
        "TP": tp,
        "FP": fp,
        "TN": tn,
        "FN": fn,
        "Accuracy": (tp + tn) / max(n, 1),
        "Precision": precision,
        "Recall": recall,
        "F1 score": 2 * precision * recall / (precision + recall) if tp else 0.0,
        "Yes ratio": (tp + fp) / max(n, 1),
    }


def _public_summary(scores: Sequence[float]) -> float:
    """The number of the public summary: the last character of each printed F1 is lost."""
    return round(sum(round(float(str(score)[:-1] or 0) * 100, 1) for score in scores) / len(scores), 1)


POPE = Benchmark(
    name="pope",
    title="POPE",
    score_field="pope",
    folder="pope",
    questions="llava_pope_test.jsonl",
    images="val2014",
    read=read_llava_questions,
    labels=tuple(_LABELS.values()),
    published=8910,
    score=_score,
)
