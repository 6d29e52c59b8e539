"""Benchmarks that ask for a letter: MMBench (once per rotation of the options), ScienceQA, and SEED-Bench."""

from __future__ import annotations

import base64
import binascii
import csv
import json
import re
import sys
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from piip_core.files import atomic_path, write_atomically

from ..conversation import IMAGE_TAG
from ..data.records import reading
from .benchmark import (
    LETTER,
    SOURCES,
    Answer,
    Benchmark,
    EvalError,
    Question,
    Score,
    checked,
    last_answers,
    percent,
    read_json,
    read_llava_questions,
    write_json,
)

# ---- MMBench ----

_NEEDED = ("index", "question", "A", "B", "image")
_ROTATION = 1_000_000  # a rotated copy has the index of its question plus a multiple of this
# Cells that pandas, by which the public scripts read the table, takes for missing ones
_MISSING = {"", "#N/A", "#N/A N/A", "#NA", "-1.#IND", "-1.#QNAN", "-NaN", "-nan", "1.#IND", "1.#QNAN", "<NA>"}
_MISSING |= {"N/A", "NA", "NULL", "NaN", "None", "n/a", "nan", "null"}
_DROPPED = ("hint", "category", "source", "image", "comment", "l2-category")
_PREDICTION_COLUMN = 6


def read_mmbench(path: Path, *, instruction: str = LETTER, all_rounds: bool = False) -> list[Question]:
    """The questions of a table, a row each, with base64 images, or in place of one the index of an earlier row.

    Args:
        path: The table.
        instruction: What follows the options.
        all_rounds: Ask each row once per rotation of its options, for tables that do not list rotations themselves.
    """
    questions: list[Question] = []
    images: dict[str, bytes] = {}
    for index, row in _rows(path):
        cell = row["image"]
        try:
            image = images[str(index)] = images[cell] if cell in images else base64.b64decode(cell, validate=True)
        except binascii.Error as error:
            raise EvalError(f"{path}: index {index}: the image is no base64 ({error}); load the file again") from None
        hint = "" if _is_none(row.get("hint", "")) else row["hint"] + "\n"
        options = _options(row)
        for shift in range(len(options) if all_rounds else 1):
            letters = [*list(options)[shift:], *list(options)[:shift]]
            texts = [options[letter] for letter in letters]
            lines = [f"{letter}. {text}" for letter, text in zip(options, texts, strict=True)]
            recorded = "\n".join([hint + row["question"], *lines])
            fields = {"round_id": shift, "options": texts, "option_char": letters}
            questions.append(Question(index, recorded + instruction, image, recorded, fields=fields))
    return questions


def chosen_letter(text: str, options: Mapping[str, str]) -> str | None:
    """The letter that an answer chooses, by the two rules that MMBench tries before it asks a language model.

    They are: exactly one of the letters stands by itself (of A in more than three words nobody can tell), and the text
    of exactly one option occurs.
    """
    words = re.sub(r"[.()\[\],:;!*#{}]", " ", text).split()
    letters = [letter for letter in options if letter in words]
    if len(letters) == 1 and not ("A" in words and len(words) > 3):
        return letters[0]
    named = [letter for letter, option in options.items() if option.lower() in text.lower()]
    return named[0] if len(named) == 1 else None


def _rows(path: Path) -> list[tuple[int, dict[str, str]]]:
    """Index and cells of the rows of a table with tabs between its cells."""
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))  # cells hold images
    rows = []
    try:
        with reading(path, EvalError, SOURCES), path.open(encoding="utf-8-sig", newline="") as file:
            table = csv.DictReader(file, delimiter="\t")
            if missing := [name for name in _NEEDED if name not in (table.fieldnames or ())]:
                raise EvalError(f"{path}: has no column {', '.join(missing)}; expected {', '.join(_NEEDED)}")
            for row in table:
                if None in row or None in row.values() or not row["index"].isdigit():
                    raise EvalError(
                        f"{path}: the row that ends at line {table.line_num} has not {len(table.fieldnames)} cells "
                        "like the header, or no number as its index; load the file again"
                    )
                rows.append((int(row["index"]), row))
    except csv.Error as error:
        raise EvalError(f"{path}: no table with tabs ({error}); load it again") from None
    if not rows:
        raise EvalError(f"{path}: has no rows; load it again")
    return rows


def _is_none(cell: str) -> bool:
    return cell in _MISSING or cell.lower() == "none"


def _options(row: Mapping[str, str]) -> dict[str, str]:
    """Letters and texts up to the first missing one: as the public script, which drops an option whose text is none."""
    options = {}
    for letter in "ABCD":
        if _is_none(row.get(letter, "")):
            break
        options[letter] = row[letter]
    return options


def _score_mmbench(path: Path, answers: Sequence[Answer]) -> Score:
    """Circular accuracy (a question is right if all of its rotations are), and vanilla (the question as it is alone).

    The published value is the circular one, from a server that also asks a language model about answers that neither
    rule of `chosen_letter` reads; they count as wrong here, and are counted.
    """
    rows = dict(_rows(path))
    if not all(row.get("answer", "") in tuple("ABCD") for row in rows.values()):
        return Score(None, ["The table has no right answers: the server scores"], {})
    right: dict[int, dict[int, bool]] = defaultdict(dict)
    unread = 0
    for answer in answers:
        if (row := rows.get(answer.id)) is not None:
            letter = chosen_letter(answer.text, _options(row))
            unread += letter is None
            right[answer.id % _ROTATION][answer.id // _ROTATION] = letter == row["answer"]
    sizes = Counter(index % _ROTATION for index in rows)
    whole = [all(found.values()) for index, found in right.items() if len(found) >= sizes[index]]
    plain = [found[0] for found in right.values() if 0 in found]
    circular, vanilla = percent(sum(whole), len(whole)), percent(sum(plain), len(plain))
    lines = [
        f"Circular: {circular or 0:.2f}% of {len(whole)} questions",
        f"Vanilla: {vanilla or 0:.2f}% of {len(plain)} questions",
        f"Answers that name no option: {unread}",
    ]
    return Score(circular, lines, {"circular": circular, "vanilla": vanilla, "unread": unread})


def _export_mmbench(path: Path, target: Path, answers: Sequence[Answer]) -> None:
    """The table that the server takes: that of the questions, some columns left out, and the answers."""
    from openpyxl import Workbook
    from openpyxl.cell.cell import ILLEGAL_CHARACTERS_RE

    rows, known = _rows(path), last_answers(answers)
    columns = [name for name in rows[0][1] if name not in _DROPPED]
    columns.insert(_PREDICTION_COLUMN, "prediction")
    book = Workbook()
    sheet = book.active
    sheet.append(columns)
    for number, (index, row) in enumerate(rows, 2):
        answer = known[index].text if index in known else ""
        cells = {name: "" if text in _MISSING else text for name, text in row.items()} | {"prediction": answer}
        for column, name in enumerate(columns, 1):
            cell = sheet.cell(number, column)
            if name == "index":
                cell.value = index
            elif cells[name]:
                cell.value = ILLEGAL_CHARACTERS_RE.sub("", cells[name])
                cell.data_type = "s"  # an answer that starts with = is no formula
    with atomic_path(target) as aside:
        book.save(aside)


MMBENCH = Benchmark(
    name="mmbench",
    title="MMBench-EN (dev)",
    folder="mmbench",
    questions="mmbench_dev_20230712.tsv",
    images=None,
    published=4377,
    max_new_tokens=1024,
    convert_before_padding=False,
    read=read_mmbench,
    score=_score_mmbench,
    export=("mmbench_dev_upload.xlsx", _export_mmbench),
    needs=("openpyxl",),
    remote="the MMBench server",
)

# ---- ScienceQA ----

_CHOICES = "ABCDE"
_FAILED = "FAILED"
_PROBLEMS, _SPLITS = "problems.json", "pid_splits.json"
_SCIENCE_QUESTION = {"id": str, "conversations": [{"value": str}]}
_SENTENCE = re.compile(r"The answer is ([A-Z]).")


def _letter(text: str) -> str | None:
    """The letter that an answer chooses, None if it has none of the forms that the official rule reads.

    These are the letter alone, the letter followed by a full stop and a space, and a single "The answer is X" that is
    followed by something.
    """
    if text in tuple(_CHOICES):
        return text
    if text[:1] in tuple(_CHOICES) and text[1:3] == ". ":
        return text[0]
    found = _SENTENCE.findall(text)
    return found[0] if len(found) == 1 else None


def _read_scienceqa(path: Path) -> list[Question]:
    questions = []
    for number, entry in enumerate(read_json(path, list)):
        where = f"{path}: entry {number}"
        turns = checked(entry, _SCIENCE_QUESTION, where)["conversations"]
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


def scienceqa_verdicts(questions_file: Path, answers: Sequence[Answer]) -> dict[str, dict[str, Any]]:
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
        if not 0 <= truth < choices <= len(_CHOICES):
            raise EvalError(f"{where}: answer {truth} of {choices} choices, expected at most {len(_CHOICES)}")
        answer = known.get(name)
        parsed = None if answer is None else _letter(answer.text)
        index = _CHOICES[:choices].find(parsed) if parsed is not None else -1
        found[name] = {
            "pred": _FAILED if answer is None else answer.text,
            "parsed": parsed or _FAILED,
            "index": index,
            "ground_truth": _CHOICES[truth],
            "correct": index == truth,
            "is_multimodal": answer is not None and IMAGE_TAG in answer.prompt,
        }
    return found


def _score_scienceqa(questions_file: Path, answers: Sequence[Answer]) -> Score:
    """Accuracy, of all questions and of those with an image; the second one is published."""
    found = list(scienceqa_verdicts(questions_file, answers).values())
    right = sum(entry["correct"] for entry in found)
    seen = [entry["correct"] for entry in found if entry["is_multimodal"]]
    total, value = percent(right, len(found)), percent(sum(seen), len(seen))
    image = "undefined (no question with an image)" if value is None else f"{value:.2f}%"
    line = f"Total: {len(found)}, Correct: {right}, Accuracy: {total or 0:.2f}%, IMG-Accuracy: {image}"
    unread = sum(entry["parsed"] == _FAILED and entry["pred"] != _FAILED for entry in found)
    details = {"accuracy": total, "image_accuracy": value, "correct": right, "count": len(found), "unread": unread}
    return Score(value, [line, f"Answers in no form that the rule reads: {unread}"], details)


def _export_scienceqa(questions_file: Path, target: Path, answers: Sequence[Answer]) -> None:
    """The result file of the official script."""
    found = scienceqa_verdicts(questions_file, answers)
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
    folder="scienceqa",
    questions="llava_test_CQM-A.json",
    images="images/test",
    published=4241,
    max_new_tokens=1024,
    convert_before_padding=False,
    labels=(_PROBLEMS, _SPLITS),
    read=_read_scienceqa,
    score=_score_scienceqa,
    export=("scienceqa_result.json", _export_scienceqa),
)

# ---- SEED-Bench ----

_SEED_LABELS = "SEED-Bench.json"


def _read_seed(path: Path) -> list[Question]:
    """The questions about images: which these are stands in the label file."""
    kinds = {_seed_id(entry): entry["data_type"] for entry in _seed_labels(path)["questions"]}
    questions = read_llava_questions(path)
    if unknown := [question.id for question in questions if question.id not in kinds]:
        raise EvalError(f"{path}: question {unknown[0]!r} is not in {_SEED_LABELS}: the two do not belong together")
    return [question for question in questions if kinds[question.id] == "image"]


def _seed_labels(questions_file: Path, **more: type) -> Mapping[str, Any]:
    form = {"question_id": str, "answer": str, "data_type": str, **more}
    return read_json(questions_file.parent / _SEED_LABELS, {"question_type": dict, "questions": [form]})


def _seed_id(entry: Mapping[str, str]) -> int | str:
    """The id that question files have: of images a number, which label files write as text."""
    name = entry["question_id"]
    return int(name) if name.isdigit() else name


def _score_seed(questions_file: Path, answers: Sequence[Answer]) -> Score:
    """Accuracy by exact equality with the letter; that of images is published.

    A question without an answer counts as wrong, but questions about videos only count if any of them was answered.
    """
    labels, known = _seed_labels(questions_file, question_type_id=int), last_answers(answers)
    kinds = {entry["data_type"] for entry in labels["questions"] if _seed_id(entry) in known}
    counted = []
    for entry in labels["questions"]:
        if entry["data_type"] in kinds:
            answer = known.get(_seed_id(entry))
            counted.append((entry, answer is not None and answer.text == entry["answer"]))

    def accuracy(field_name: str, value: Any) -> float | None:
        right = [is_right for entry, is_right in counted if entry[field_name] == value]
        return percent(sum(right), len(right))

    details = {name: accuracy("question_type_id", number) for name, number in labels["question_type"].items()}
    details["Total accuracy"] = percent(sum(is_right for _, is_right in counted), len(counted))
    details |= {f"{kind} accuracy": accuracy("data_type", kind) for kind in ("image", "video")}
    lines = [f"{name}: {value:.2f}%" for name, value in details.items() if value is not None]
    return Score(details["image accuracy"], lines, details)


def _export_seed(questions_file: Path, target: Path, answers: Sequence[Answer]) -> None:
    """The leaderboard's file: one line per answered question, in the order of the label file."""
    known = last_answers(answers)
    with write_atomically(target, "w") as file:
        for entry in _seed_labels(questions_file)["questions"]:
            if (answer := known.get(_seed_id(entry))) is not None:
                file.write(json.dumps({"question_id": entry["question_id"], "prediction": answer.text}) + "\n")


SEED = Benchmark(
    name="seed",
    title="SEED-Bench (image)",
    folder="seed_bench",
    questions="llava-seed-bench.jsonl",
    images=".",
    published=14233,
    labels=(_SEED_LABELS,),
    read=_read_seed,
    score=_score_seed,
    export=("seed_bench_upload.jsonl", _export_seed),
    remote="the SEED-Bench leaderboard",
)
