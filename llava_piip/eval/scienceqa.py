"""ScienceQA: multiple choice from school books, with and without a picture."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..conversation import IMAGE_TAG
from .benchmark import LETTER, Answer, Benchmark, Question, Score, last_answers, percent
from .files import EvalError, field, read_json, write_json

__all__ = ["SCIENCEQA", "answered_letter", "verdicts"]

_LETTERS = "ABCDE"
_FAILED = "FAILED"
_PROBLEMS, _SPLITS = "problems.json", "pid_splits.json"
_SENTENCE = re.compile(r"The answer is ([A-Z]).")


def answered_letter(text: str) -> str | None:
    """The letter that an answer chooses, None if it has none of the forms that the official rule reads.

    These are the letter alone, the letter followed by a full stop and a space, and a single "The answer is X" that is
    followed by something.
    """
    if text in tuple(_LETTERS):
        return text
    if text[:1] in tuple(_LETTERS) and text[1:3] == ". ":
        return text[0]
    found = _SENTENCE.findall(text)
    return found[0] if len(found) == 1 else None


def _read(path: Path) -> list[Question]:
    entries = read_json(path)
    if not isinstance(entries, list) or not entries:
        raise EvalError(f"{path}: expected a list of questions")
    questions = []
    for number, entry in enumerate(entries):
        where = f"{path}: entry {number}"
        name, turns = field(entry, "id", str, where), field(entry, "conversations", list, where)
        image = field(entry, "image", str, where) if entry.get("image") is not None else None
        if not turns or not isinstance(turns[0], dict):
            raise EvalError(f"{where} (id {name!r}): has no turn; expected the question as the first one")
        asked = field(turns[0], "value", str, f"{where} (id {name!r}): turn 1")
        text = asked.replace(IMAGE_TAG, "").strip() + LETTER
        questions.append(Question(name, text, image, recorded=f"{IMAGE_TAG}\n{text}" if image else None))
    return questions


def verdicts(questions_file: Path, answers: Sequence[Answer]) -> dict[str, dict[str, Any]]:
    """What became of each question of the test split: pred, parsed, index, ground_truth, correct, is_multimodal."""
    problems, split = (read_json(questions_file.parent / name) for name in (_PROBLEMS, _SPLITS))
    if not isinstance(problems, Mapping):
        raise EvalError(f"{questions_file.parent / _PROBLEMS}: expected an object with the problems by their ids")
    known, found = last_answers(answers), {}
    for name in map(str, field(split, "test", list, str(questions_file.parent / _SPLITS))):
        where = f"{questions_file.parent / _PROBLEMS}: problem {name!r}"
        if name not in problems:
            raise EvalError(f"{where} is missing; load the file again")
        choices, truth = field(problems[name], "choices", list, where), field(problems[name], "answer", int, where)
        if not 0 <= truth < len(choices) <= len(_LETTERS):
            raise EvalError(f"{where}: answer {truth} of {len(choices)} choices, expected at most {len(_LETTERS)}")
        answer = known.get(name)
        parsed = None if answer is None else answered_letter(answer.text)
        index = _LETTERS[: len(choices)].find(parsed) if parsed is not None else -1
        found[name] = {
            "pred": _FAILED if answer is None else answer.text,
            "parsed": parsed or _FAILED,
            "index": index,
            "ground_truth": _LETTERS[truth],
            "correct": index == truth,
            "is_multimodal": answer is not None and IMAGE_TAG in answer.prompt,
        }
    return found


def _score(questions_file: Path, answers: Sequence[Answer]) -> Score:
    """Accuracy, of all questions and of those with a picture; the second one is published."""
    found = list(verdicts(questions_file, answers).values())
    pictured = [entry for entry in found if entry["is_multimodal"]]
    right, right_pictured = (sum(entry["correct"] for entry in entries) for entries in (found, pictured))
    total, value = percent(right, len(found)), percent(right_pictured, len(pictured))
    image = "undefined (no question with a picture)" if value is None else f"{value:.2f}%"
    line = f"Total: {len(found)}, Correct: {right}, Accuracy: {total or 0:.2f}%, IMG-Accuracy: {image}"
    unread = sum(entry["parsed"] == _FAILED and entry["pred"] != _FAILED for entry in found)
    details = {"accuracy": total, "image_accuracy": value, "correct": right, "count": len(found), "unread": unread}
    return Score(value, [line, f"Answers in no form that the rule reads: {unread}"], details)


def _export(questions_file: Path, target: Path, answers: Sequence[Answer]) -> None:
    """The result file of the official script."""
    found = verdicts(questions_file, answers)
    right = sum(entry["correct"] for entry in found.values())
    content = {
        "acc": percent(right, len(found)),
        "correct": right,
        "count": len(found),
        "results": {name: entry["index"] for name, entry in found.items()},
        "outputs": {name: entry["pred"] for name, entry in found.items()},
    }
    write_json(target, content, indent=2)


SCIENCEQA = Benchmark(
    name="scienceqa",
    title="ScienceQA-IMG",
    score_field="scienceqa_image",
    folder="scienceqa",
    questions="llava_test_CQM-A.json",
    images="images/test",
    read=_read,
    labels=(_PROBLEMS, _SPLITS),
    published=4241,
    max_new_tokens=1024,
    convert_before_padding=False,
    score=_score,
    export=("scienceqa_result.json", _export),
)
