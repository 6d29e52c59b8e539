"""SEED-Bench: multiple choice, its questions about images."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from piip_core.files import write_atomically

from .benchmark import Answer, Benchmark, Question, Score, last_answers, percent, read_llava_questions
from .files import EvalError, read_json

__all__ = ["SEED"]

_LABELS = "SEED-Bench.json"


def _read(path: Path) -> list[Question]:
    """The questions about images: which these are stands in the label file."""
    kinds = {_id(entry): entry["data_type"] for entry in _labels(path)["questions"]}
    questions = read_llava_questions(path)
    if unknown := [question.id for question in questions if question.id not in kinds]:
        raise EvalError(f"{path}: question {unknown[0]!r} is not in {_LABELS}: the two files do not belong together")
    return [question for question in questions if kinds[question.id] == "image"]


def _labels(questions_file: Path, **more: type) -> Mapping[str, Any]:
    form = {"question_id": str, "answer": str, "data_type": str, **more}
    return read_json(questions_file.parent / _LABELS, {"question_type": dict, "questions": [form]})


def _id(entry: Mapping[str, str]) -> int | str:
    """The id that question files have: of images a number, which label files write as text."""
    name = entry["question_id"]
    return int(name) if name.isdigit() else name


def _score(questions_file: Path, answers: Sequence[Answer]) -> Score:
    """Accuracy by exact equality with the letter; that of images is published.

    A question without an answer counts as wrong, but questions about videos only count if any of them was answered.
    """
    labels, known = _labels(questions_file, question_type_id=int), last_answers(answers)
    kinds = {entry["data_type"] for entry in labels["questions"] if _id(entry) in known}
    counted = [entry for entry in labels["questions"] if entry["data_type"] in kinds]

    def accuracy(field_name: str, value: Any) -> float | None:
        right = [_is_right(entry, known) for entry in counted if entry[field_name] == value]
        return percent(sum(right), len(right))

    details = {name: accuracy("question_type_id", number) for name, number in labels["question_type"].items()}
    details["Total accuracy"] = percent(sum(_is_right(entry, known) for entry in counted), len(counted))
    details |= {f"{kind} accuracy": accuracy("data_type", kind) for kind in ("image", "video")}
    lines = [f"{name}: {value:.2f}%" for name, value in details.items() if value is not None]
    return Score(details["image accuracy"], lines, details)


def _is_right(entry: Mapping[str, Any], known: Mapping[int | str, Answer]) -> bool:
    answer = known.get(_id(entry))
    return answer is not None and answer.text == entry["answer"]


def _export(questions_file: Path, target: Path, answers: Sequence[Answer]) -> None:
    """The leaderboard's file: one line per answered question, in the order of the label file."""
    known = last_answers(answers)
    with write_atomically(target, "w") as file:
        for entry in _labels(questions_file)["questions"]:
            if (answer := known.get(_id(entry))) is not None:
                file.write(json.dumps({"question_id": entry["question_id"], "prediction": answer.text}) + "\n")


SEED = Benchmark(
    name="seed",
    title="SEED-Bench (image)",
    score_field="seed_image",
    folder="seed_bench",
    questions="llava-seed-bench.jsonl",
    images=".",
    read=_read,
    labels=(_LABELS,),
    published=14233,
    score=_score,
    export=("seed_bench_upload.jsonl", _export),
    remote="the SEED-Bench leaderboard",
)
