"""POPE: is an object in the image? Three ways of choosing the objects that are not."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

from .benchmark import Answer, Benchmark, Score, last_answers, read_llava_questions
from .files import EvalError, read_json_lines

__all__ = ["POPE", "yes_or_no"]

_LABELS = {category: f"coco/coco_pope_{category}.json" for category in ("adversarial", "popular", "random")}
_PRINTED = ("Accuracy", "Precision", "Recall", "F1 score", "Yes ratio")


def yes_or_no(text: str) -> str:
    """What an answer says: "no" if its first sentence has the word No, not or no, otherwise "yes"."""
    words = text.partition(".")[0].replace(",", "").split(" ")
    return "no" if any(word in ("No", "not", "no") for word in words) else "yes"


def _score(questions_file: Path, answers: Sequence[Answer]) -> Score:
    """Compares with the labels, question by question.

    The public script pairs the answers of a category with the labels by their order in the file, takes every label but
    "no" for yes, and its summary drops the last digit of each F1, rounds it, and then takes the mean.
    """
    questions = read_llava_questions(questions_file)
    categories = {question.id: question.category for question in questions}
    known = last_answers(answers)
    details, public = {}, {}
    for category in dict.fromkeys(categories.values()):
        if category not in _LABELS:
            raise EvalError(f"{questions_file}: category {category!r}; expected {', '.join(_LABELS)}")
        labels = _read_labels(questions_file.parent / _LABELS[category])
        asked = [question for question in questions if question.category == category]
        if len(labels) != len(asked):
            raise EvalError(
                f"{questions_file}: {len(asked)} questions of category {category!r}, but {len(labels)} labels in "
                f"{_LABELS[category]}: they belong to different versions of the benchmark"
            )
        pairs = zip(labels, asked, strict=True)
        details[category] = _metrics((label.lower(), known[q.id].text) for label, q in pairs if q.id in known)
        in_order = [answer.text for answer in answers if categories.get(answer.id) == category]
        public_labels = ("no" if label == "no" else "yes" for label in labels)
        public[category] = _metrics(zip(public_labels, in_order, strict=False))
    value = 100 * sum(found["F1 score"] for found in details.values()) / len(details)
    # The last character of each printed F1 is lost
    printed = [round(float(str(found["F1 score"])[:-1] or 0) * 100, 1) for found in public.values()]
    summary = round(sum(printed) / len(printed), 1)
    lines = []
    for category, found in details.items():
        numbers = ", ".join(f"{name} {found[name]:.3f}" for name in _PRINTED)
        lines.append(f"{category}: {found['n']} answers, {numbers}")
    if f"{summary:.1f}" != f"{value:.1f}":
        lines.append(
            f"the public script gives {summary:.1f}: it pairs answers with labels by their order, and rounds each F1 "
            "after dropping its last digit"
        )
    return Score(value, lines, {**details, "public": public, "public summary": summary})


def _read_labels(path: Path) -> list[str]:
    labels = []
    for where, entry in read_json_lines(path, {"label": str}):
        if entry["label"].lower() not in ("yes", "no"):
            raise EvalError(f"{where}: label {entry['label']!r}, expected yes or no")
        labels.append(entry["label"])
    return labels


def _metrics(pairs: Iterable[tuple[str, str]]) -> dict[str, float]:
    """Counts and measures of (label, text of the answer); yes is positive, and what cannot be divided is 0."""
    counts = Counter((label, yes_or_no(text)) for label, text in pairs)
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
