"""GQA: compositional questions about scenes, test-dev balanced."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from .benchmark import Answer, Benchmark, Score, percent, read_llava_questions
from .files import EvalError, field, read_json, write_json

__all__ = ["GQA", "predictions", "verdicts"]

_QUESTIONS = "data/testdev_balanced_questions.json"
# Steps of a question's program that end it, and do not count among its steps
_LAST_STEPS = ("exist", "query: name", "choose name")


def predictions(answers: Sequence[Answer]) -> list[dict[str, Any]]:
    """The official script's list of predictions: periods at the end removed, lower case."""
    return [{"questionId": answer.id, "prediction": answer.text.rstrip(".").lower()} for answer in answers]


def verdicts(questions_file: Path, answers: Sequence[Answer]) -> dict[str, dict[str, Any]]:
    """What became of each question: gold, prediction (None without an answer), correct, counted."""
    found = _verdicts(_read(questions_file), answers)
    return {name: {key: entry[key] for key in ("gold", "prediction", "correct", "counted")} for name, entry in found}


def _read(questions_file: Path) -> Mapping[str, Mapping[str, Any]]:
    path = questions_file.parent / _QUESTIONS
    content = read_json(path)
    if not isinstance(content, Mapping) or not content:
        raise EvalError(f"{path}: expected an object with the questions by their ids; load it again")
    for name, question in content.items():
        _check(question, f"{path}: question {name!r}")
    return content


def _check(question: Any, where: str) -> None:
    """Refuses a question without what the score needs."""
    for name in ("answer", "question"):
        field(question, name, str, where)
    types = field(question, "types", dict, where)
    for name in ("structural", "semantic"):
        field(types, name, str, f"{where}: types")
    for step in field(question, "semantic", list, where):
        for name in ("operation", "argument"):
            field(step, name, str, f"{where}: semantic")
    field(field(question, "groups", dict, where), "global", (str, type(None)), f"{where}: groups")


def _verdicts(questions: Mapping[str, Any], answers: Sequence[Answer]) -> list[tuple[str, dict[str, Any]]]:
    predicted = {entry["questionId"]: entry["prediction"] for entry in predictions(answers)}
    found = []
    for name, question in questions.items():
        gold, prediction = question["answer"], predicted.get(name)
        counted = bool(question.get("isBalanced"))
        entry = {"gold": gold, "prediction": prediction, "correct": prediction == gold, "counted": counted}
        found.append((name, entry | {"question": question}))
    return found


def _score(questions_file: Path, answers: Sequence[Answer]) -> Score:
    """Accuracy by exact equality, with the official breakdown.

    Validity and plausibility need files that test-dev does not have, and are left out. Questions without an answer,
    at which the official script stops, are not counted.
    """
    found = _verdicts(_read(questions_file), answers)
    counted = [entry for _, entry in found if entry["counted"] and entry["prediction"] is not None]
    kinds = _by(counted, lambda question: "Open" if question["types"]["structural"] == "query" else "Binary")
    value = _accuracy(counted)
    distribution = _distribution(counted)
    lines = [f"{kind}: {_accuracy(kinds.get(kind, [])) or 0:.2f}%" for kind in ("Binary", "Open")]
    lines.append(f"Accuracy: {value or 0:.2f}%")
    if distribution is not None:
        lines.append(f"Distribution: {distribution:.2f} (lower is better)")
    details = {"accuracy": value, "distribution": distribution}
    for title, key in _BREAKDOWN.items():
        groups = _by(counted, key)
        lines.append(f"Accuracy / {title}:")
        lines += [
            f"  {name}: {_accuracy(groups[name]):.2f}% ({len(groups[name])} questions)" for name in sorted(groups)
        ]
        details[title] = {str(name): _accuracy(group) for name, group in groups.items()}
    return Score(value, lines, details)


def _steps(question: Mapping[str, Any]) -> int:
    """Steps of the program behind a question, without those that only read off the result."""
    steps = [f"{step['operation']}: {step['argument']}" for step in question["semantic"]]
    return sum(not any(last in step for last in _LAST_STEPS) for step in steps)


_BREAKDOWN = {
    "structural type": lambda question: question["types"]["structural"],
    "semantic type": lambda question: question["types"]["semantic"],
    "steps number": _steps,
    "words number": lambda question: len(question["question"].split()),
}


def _by(entries: Iterable[Mapping[str, Any]], key: Any) -> dict[Any, list[Mapping[str, Any]]]:
    groups = defaultdict(list)
    for entry in entries:
        groups[key(entry["question"])].append(entry)
    return dict(groups)


def _accuracy(entries: Sequence[Mapping[str, Any]]) -> float | None:
    return percent(sum(entry["correct"] for entry in entries), len(entries))


def _distribution(entries: Iterable[Mapping[str, Any]]) -> float | None:
    """Chi-square between right and given answers of questions of one group, averaged by the groups' sizes."""
    gold: dict[str, Counter[str]] = defaultdict(Counter)
    given: dict[str, Counter[str]] = defaultdict(Counter)
    for entry in entries:
        group = entry["question"]["groups"].get("global")
        if group is not None:
            gold[group][entry["gold"]] += 1
            given[group][entry["prediction"]] += 1
    size = sum(counts.total() for counts in gold.values())
    chi = {
        group: sum((given[group][answer] - count) ** 2 / count for answer, count in counts.items())
        for group, counts in gold.items()
    }
    return sum(chi[group] * gold[group].total() for group in gold) / size / 100 if size else None


def _export(questions_file: Path, target: Path, answers: Sequence[Answer]) -> None:
    write_json(target, predictions(answers))


GQA = Benchmark(
    name="gqa",
    title="GQA",
    score_field="gqa",
    folder="gqa",
    questions="llava_gqa_testdev_balanced.jsonl",
    images="data/images",
    read=read_llava_questions,
    labels=(_QUESTIONS,),
    published=12578,
    score=_score,
    export=("testdev_balanced_predictions.json", _export),
)
