"""ScienceQA: multiple choice from school books, with and without an image."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..conversation import IMAGE_TAG
from .benchmark import LETTER, Answer, Benchmark, Question, Score, last_answers, percent
from .files import EvalError, checked, read_json, write_json

__all__ = ["SCIENCEQA", "verdicts"]

_LETTERS = "ABCDE"
_FAILED = "FAILED"
_PROBLEMS, _SPLITS = "problems.json", "pid_splits.json"
_QUESTION = {"id": str, "conversations": [{"value": str}]}
_SENTENCE = re.compile(r"The answer is ([A-Z]).")


def _letter(text: str) -> str | None:
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
    questions = []
    for number, entry in enumerate(read_json(path, list)):
        where = f"{path}: entry {number}"
        turns = checked(entry, _QUESTION, where)["conversations"]
        image = entry.get("image")
        checked(image, (str, type(None)), f"{where}: 'image'")
        if not turns:
            raise EvalError(f"{where} (id {entry['id']!r}): has no turn; expected the question as the first one")
        text = turns[0]["value"].replace(IMAGE_TAG, "").strip() + LETTER
        recorded = None if image is None else f"{IMAGE_TAG}\n{text}"
        questions.append(Question(entry["id"], text, image, recorded))
    if not questions:
        raise EvalError(f"{path}: has no questions; load it again")
    return questions


def verdicts(questions_file: Path, answers: Sequence[Answer]) -> dict[str, dict[str, Any]]:
    """What became of each question of the test split: pred, parsed, index, ground_truth, correct, is_multimodal."""
    problems = read_json(questions_file.parent / _PROBLEMS, dict)
    split = read_json(questions_file.parent / _SPLITS, {"test": list})["test"]
    known, found = last_answers(answers), {}
    for name in map(str, split):
        where = f"{questions_file.parent / _PROBLEMS}: problem {name!r}"
        if name not in problems:
            raise EvalError(f"{where} is missing; load the file again")
        problem = checked(problems[name], {"choices": list, "answer": int}, where)
        choices, truth = len(problem["choices"]), problem["answer"]
        if not 0 <= truth < choices <= len(_LETTERS):
            raise EvalError(f"{where}: answer {truth} of {choices} choices, expected at most {len(_LETTERS)}")
        answer = known.get(name)
        parsed = None if answer is None else _letter(answer.text)
        index = _LETTERS[:choices].find(parsed) if parsed is not None else -1
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
    """Accuracy, of all questions and of those with an image; the second one is published."""
    found = list(verdicts(questions_file, answers).values())
    right = sum(entry["correct"] for entry in found)
    seen = [entry["correct"] for entry in found if entry["is_multimodal"]]
    total, value = percent(right, len(found)), percent(sum(seen), len(seen))
    image = "undefined (no question with an image)" if value is None else f"{value:.2f}%"
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
