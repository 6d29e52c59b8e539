"""TextVQA: questions about the text in pictures, with ten people's answers."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from .benchmark import Answer, Benchmark, Score, percent, read_llava_questions
from .files import EvalError, field, read_json
from .vqa_text import normalized

__all__ = ["TEXTVQA", "answer_scores", "question_of_prompt"]

_ANNOTATIONS = "TextVQA_0.5.1_val.json"
_NUM_ANSWERS = 10
_SUFFIX = "Answer the question using a single word or phrase."
_TOKENS = "Reference OCR token: "
_OLD_FORM = re.compile(r"OCR tokens: .*? Question: (?P<question>.*?) Short answer:")


def answer_scores(answers: Sequence[str]) -> dict[str, float]:
    """What each different answer is worth: the mean over nine of the ten people of min(1, agreeing / 3).

    Args:
        answers: Ten answers; they are normalised here.

    Raises:
        EvalError: If there are not ten.
    """
    if len(answers) != _NUM_ANSWERS:
        raise EvalError(f"{len(answers)} answers of people, expected {_NUM_ANSWERS}")
    counts = Counter(map(normalized, answers))
    # Leaving out one who gave the answer leaves count - 1 agreeing, leaving out another one leaves count
    return {
        answer: (count * min(1.0, (count - 1) / 3) + (_NUM_ANSWERS - count) * min(1.0, count / 3)) / _NUM_ANSWERS
        for answer, count in counts.items()
    }


def question_of_prompt(prompt: str) -> str:
    """The question within a prompt, in lower case, by which annotations are found.

    Raises:
        EvalError: If it is none of the known forms: the question and the instruction in lines of their own, with the
            recognised text before or after the question, or not.
    """
    if match := _OLD_FORM.fullmatch(prompt):
        return match["question"].lower()
    lines = prompt.split("\n")
    inner = [line for line in lines[:-1] if not line.startswith(_TOKENS)]
    if lines[-1] == _SUFFIX and len(lines) <= 3 and len(inner) == 1:
        return inner[0].lower()
    raise EvalError(
        f"prompt {prompt[:120]!r}: expected the question, a line {_TOKENS + '...'!r} before or after it if any, and "
        f"the line {_SUFFIX!r}"
    )


def _score(questions_file: Path, answers: Sequence[Answer]) -> Score:
    """Mean worth of the answers; those of questions that were not answered do not count."""
    annotations = _read_annotations(questions_file.parent / _ANNOTATIONS)
    total = 0.0
    for answer in answers:
        key = (str(answer.id), question_of_prompt(answer.prompt))
        if key not in annotations:
            raise EvalError(f"the question {key[1]!r} to image {key[0]!r} is not in {_ANNOTATIONS}")
        try:
            total += answer_scores(annotations[key]).get(normalized(answer.text), 0.0)
        except EvalError as error:
            raise EvalError(f"{_ANNOTATIONS}: question {key[1]!r} to image {key[0]!r}: {error}") from None
    value = percent(total, len(answers))
    lines = [f"Samples: {len(answers)}", f"Accuracy: {value or 0:.2f}%"]
    return Score(value, lines, {"samples": len(answers), "accuracy": value})


def _read_annotations(path: Path) -> Mapping[tuple[str, str], Sequence[str]]:
    content = read_json(path)
    entries = content.get("data") if isinstance(content, dict) else None
    if not isinstance(entries, list):
        raise EvalError(f"{path}: has no list 'data'; load it again")
    found = {}
    for number, entry in enumerate(entries):
        where = f"{path}: entry {number}"
        key = field(entry, "image_id", str, where), field(entry, "question", str, where).lower()
        found[key] = field(entry, "answers", list, where)
        if not all(isinstance(answer, str) for answer in found[key]):
            raise EvalError(f"{where}: 'answers' is {str(found[key])[:60]}, expected a list of texts")
    return found


TEXTVQA = Benchmark(
    name="textvqa",
    title="TextVQA",
    score_field="textvqa",
    folder="textvqa",
    questions="llava_textvqa_val_v051_ocr.jsonl",
    images="train_images",
    read=read_llava_questions,
    labels=(_ANNOTATIONS,),
    published=5000,
    score=_score,
)
