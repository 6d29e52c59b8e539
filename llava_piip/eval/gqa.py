"""GQA: compositional questions about scenes, test-dev balanced."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from .benchmark import Answer, Benchmark, Score, percent, read_llava_questions
from .files import EvalError, checked, read_json, write_json

__all__ = ["GQA", "predictions", "read_labels", "verdicts"]

_LABELS = "data/testdev_balanced_questions.json"
_LABEL = {
    "answer": str,
    "question": str,
    "types": {"structural": str, "semantic": str},
    "semantic": [{"operation": str, "argument": str}],
    "groups": {"global": (str, type(None))},
}
# Steps of a question's program that end it, and do not count among its steps
_LAST_STEPS = ("exist", "query: name", "choose name")

Labels = Mapping[str, Mapping[str, Any]]
Counted = Sequence[tuple[Mapping[str, Any], Mapping[str, Any]]]


def predictions(answers: Sequence[Answer]) -> list[dict[str, Any]]:
    """The official script's list of predictions: periods at the end removed, lower case."""
    return [{"questionId": answer.id, "prediction": answer.text.rstrip(".").lower()} for answer in answers]


def read_labels(questions_file: Path) -> Labels:
    """The official questions by their ids, which lie beside LLaVA's question file."""
    path = questions_file.parent / _LABELS
    content = read_json(path, dict)
    if not content:
        raise EvalError(f"{path}: has no questions; load it again")
    for name, label in content.items():
        checked(label, _LABEL, f"{path}: question {name!r}")
    return content


def verdicts(labels: Labels, answers: Sequence[Answer]) -> dict[str, dict[str, Any]]:
    """What became of each question: gold, prediction (None without an answer), correct, counted."""
    predicted = {entry["questionId"]: entry["prediction"] for entry in predictions(answers)}
    found = {}
    for name, label in labels.items():
        gold, prediction = label["answer"], predicted.get(name)
        verdict = {"gold": gold, "prediction": prediction, "correct": prediction == gold}
        found[name] = verdict | {"counted": bool(label.get("isBalanced"))}
    return found


def _score(questions_file: Path, answers: Sequence[Answer]) -> Score:
    """Accuracy by exact equality, with the official breakdown.

    Validity and plausibility need files that test-dev does not have, and are left out. Questions without an answer,
    at which the official script stops, are not counted.
    """
    labels = read_labels(questions_file)
    found = verdicts(labels, answers)
    counted = [(labels[n], v) for n, v in found.items() if v["counted"] and v["prediction"] is not None]
    kinds = _accuracies(counted, lambda label: "Open" if label["types"]["structural"] == "query" else "Binary")
    value = percent(sum(verdict["correct"] for _, verdict in counted), len(counted))
    distribution = _distribution(counted)
    lines = [f"{kind}: {kinds.get(kind, (0.0, 0))[0]:.2f}%" for kind in ("Binary", "Open")]
    lines.append(f"Accuracy: {value or 0:.2f}%")
    if distribution is not None:
        lines.append(f"Distribution: {distribution:.2f} (lower is better)")
    details = {"accuracy": value, "distribution": distribution}
    for title, key in _BREAKDOWN.items():
        groups = _accuracies(counted, key)
        lines.append(f"Accuracy / {title}:")
        lines += [f"  {name}: {groups[name][0]:.2f}% ({groups[name][1]} questions)" for name in sorted(groups)]
        details[title] = {str(name): accuracy for name, (accuracy, _) in groups.items()}
    return Score(value, lines, details)


def _steps(label: Mapping[str, Any]) -> int:
    """Steps of the program that a question stands for, without those that only read off the result."""
    steps = [f"{step['operation']}: {step['argument']}" for step in label["semantic"]]
    return sum(not any(last in step for last in _LAST_STEPS) for step in steps)


_BREAKDOWN = {
    "structural type": lambda label: label["types"]["structural"],
    "semantic type": lambda label: label["types"]["semantic"],
    "steps number": _steps,
    "words number": lambda label: len(label["question"].split()),
}


def _accuracies(counted: Counted, key: Callable[[Mapping[str, Any]], Any]) -> dict[Any, tuple[float, int]]:
    """Accuracy and number of questions by what the key makes of their labels."""
    groups = defaultdict(list)
    for label, verdict in counted:
        groups[key(label)].append(verdict["correct"])
    return {name: (percent(sum(right), len(right)), len(right)) for name, right in groups.items()}


def _distribution(counted: Counted) -> float | None:
    """Chi-square between right and given answers of questions of one group, averaged by the groups' sizes."""
    gold: dict[str, Counter[str]] = defaultdict(Counter)
    given: dict[str, Counter[str]] = defaultdict(Counter)
    for label, verdict in counted:
        group = label["groups"]["global"]
        if group is not None:
            gold[group][verdict["gold"]] += 1
            given[group][verdict["prediction"]] += 1
    size = sum(counts.total() for counts in gold.values())
    chi = {
        group: sum((given[group][answer] - count) ** 2 / count for answer, count in counts.items())
        for group, counts in gold.items()
    }
    return sum(chi[group] * gold[group].total() for group in gold) / size / 100 if size else None


GQA = Benchmark(
    name="gqa",
    title="GQA",
    score_field="gqa",
    folder="gqa",
    questions="llava_gqa_testdev_balanced.jsonl",
    images="data/images",
    read=read_llava_questions,
    labels=(_LABELS,),
    published=12578,
    score=_score,
    export=(
        "testdev_balanced_predictions.json",
        lambda questions_file, target, answers: write_json(target, predictions(answers)),
    ),
)
