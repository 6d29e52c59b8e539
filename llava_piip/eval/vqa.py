"""Open questions: VQAv2, MM-Vet, and TextVQA, which compares with ten people's answers."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from functools import cache
from pathlib import Path

from .benchmark import Answer, Benchmark, Score, last_answers, percent, read_llava_questions
from .files import EvalError, read_json, write_json

__all__ = ["MM_VET", "TEXTVQA", "VQAV2", "answer_scores", "normalized", "question_of_prompt"]

_MARKS = ';/[]"{}()=+\\_-><@`!'
_PERIOD = re.compile(r"\.(?!\d)")
_MOST_PERIODS = 32  # the public scripts hand a flag (re.UNICODE) to re.sub where it takes a count
_ARTICLES = ("a", "an", "the")
_DIGITS = "zero one two three four five six seven eight nine ten".split()
_NUMBERS = {"none": "0"} | {word: str(value) for value, word in enumerate(_DIGITS)}

# Contractions that are completed where one apostrophe is missing. In the official table those of I are written with a
# capital, and never match lower-case text.
_NOT = "ai are ca could did does do had has have is might must need ought sha should was were wo would"
_TARGETS = (
    *(f"{word}n't" for word in _NOT.split()),
    *(f"{word}n't've" for word in "could had might should would".split()),
    *(f"{word}'ve" for word in "could might must not should they we what where who would you".split()),
    *(f"{word}'d've" for word in "he it she somebody someone something there they we who y'all you".split()),
    *(f"{word}'d" for word in "he how it someone something there they where who you".split()),
    *(f"{word}'ll" for word in "how it somebody someone something they what who why y'all you".split()),
    *(f"{word}'s" for word in "he how somebody someone that there what when where who why".split()),
    *(f"{word}'re" for word in "there they what why you".split()),
    *("ma'am", "o'clock", "'twas", "y'all", "'ow's'at"),
)


def normalized(text: str) -> str:
    """An answer as it is compared: lower case, without punctuation and articles, numbers as digits.

    Follows the official evaluation of VQA as TextVQA uses it, with its peculiarities: a mark is removed where it stands
    next to a space anywhere in the text and becomes a space otherwise, and only the first 32 periods are removed.
    """
    text = text.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip()
    text = text.replace("\n", " ").replace("\t", " ")
    marked = text
    for mark in _MARKS:
        beside_space = f"{mark} " in marked or f" {mark}" in marked
        text = text.replace(mark, "" if beside_space else " ")
    text = _PERIOD.sub("", text, count=_MOST_PERIODS)
    words = (_NUMBERS.get(word, word) for word in text.lower().split())
    return " ".join(_contractions().get(word, word) for word in words if word not in _ARTICLES)


@cache
def _contractions() -> dict[str, str]:
    """Spellings with one apostrophe missing, and what they become."""
    table = {}
    for target in _TARGETS:
        for index, character in enumerate(target):
            if character == "'":
                table[target[:index] + target[index + 1 :]] = target
    # The official table has this one the other way round
    table["somebody'd"] = "somebodyd"
    return table


_ANNOTATIONS = "TextVQA_0.5.1_val.json"
_ANNOTATION_FORM = {"data": [{"image_id": str, "question": str, "answers": [str]}]}
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
    path = questions_file.parent / _ANNOTATIONS
    people: dict[tuple[str, str], Sequence[str]] = {
        (entry["image_id"], entry["question"].lower()): entry["answers"]
        for entry in read_json(path, _ANNOTATION_FORM)["data"]
    }
    total = 0.0
    for answer in answers:
        name, question = str(answer.id), question_of_prompt(answer.prompt)
        if (name, question) not in people:
            raise EvalError(f"{path}: the question {question!r} to image {name!r} is missing")
        try:
            total += answer_scores(people[name, question]).get(normalized(answer.text), 0.0)
        except EvalError as error:
            raise EvalError(f"{path}: question {question!r} to image {name!r}: {error}") from None
    value = percent(total, len(answers))
    lines = [f"Samples: {len(answers)}", f"Accuracy: {value or 0:.2f}%"]
    return Score(value, lines, {"samples": len(answers), "accuracy": value})


# The server of VQAv2 wants an entry for every question of the whole test split, of which test-dev is a part
_ALL_QUESTIONS = "llava_vqav2_mscoco_test2015.jsonl"


def _export_vqav2(questions_file: Path, target: Path, answers: Sequence[Answer]) -> None:
    known = last_answers(answers)
    ids = [question.id for question in read_llava_questions(questions_file.parent / _ALL_QUESTIONS)]
    texts = (normalized(known[name].text) if name in known else "" for name in ids)
    write_json(target, [{"question_id": name, "answer": text} for name, text in zip(ids, texts, strict=True)])


def _export_mm_vet(questions_file: Path, target: Path, answers: Sequence[Answer]) -> None:
    write_json(target, {f"v1_{answer.id}": answer.text for answer in answers}, indent=2)


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
VQAV2 = Benchmark(
    name="vqav2",
    title="VQAv2",
    score_field="vqav2",
    folder="vqav2",
    questions="llava_vqav2_mscoco_test-dev2015.jsonl",
    images="test2015",
    read=read_llava_questions,
    labels=(_ALL_QUESTIONS,),
    published=107_394,
    export=("vqav2_upload.json", _export_vqav2),
    remote="the VQA challenge's server on EvalAI (test-dev)",
)
MM_VET = Benchmark(
    name="mmvet",
    title="MM-Vet",
    score_field="mm_vet",
    folder="mm-vet",
    questions="llava-mm-vet.jsonl",
    images="images",
    read=read_llava_questions,
    published=218,
    max_new_tokens=1024,
    export=("mmvet_upload.json", _export_mm_vet),
    remote="MM-Vet's grader (GPT-4)",
)
