"""MMBench: multiple choice, asked once per rotation of the options."""

from __future__ import annotations

import base64
import binascii
import re
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from piip_core.files import atomic_path

from .benchmark import LETTER, Answer, Benchmark, Question, Score, last_answers, percent
from .files import EvalError, read_table

__all__ = ["MMBENCH", "MMBENCH_CN", "MMBENCH_TEST", "chosen_letter", "read_mmbench"]

_LETTERS = "ABCD"
_NEEDED = ("index", "question", "A", "B", "image")
_ROTATION = 1_000_000  # a rotated copy has the index of its question plus a multiple of this
_CHINESE = "\n请直接回答选项字母。"
# Cells that pandas, by which the public scripts read the table, takes for missing ones
_MISSING = {"", "#N/A", "#N/A N/A", "#NA", "-1.#IND", "-1.#QNAN", "-NaN", "-nan", "1.#IND", "1.#QNAN", "<NA>"}
_MISSING |= {"N/A", "NA", "NULL", "NaN", "None", "n/a", "nan", "null"}
_DROPPED = ("hint", "category", "source", "image", "comment", "l2-category")
_PREDICTION_COLUMN = 6


def read_mmbench(path: Path, *, instruction: str = LETTER, all_rounds: bool = False) -> list[Question]:
    """The questions of a table, a row each.

    Args:
        path: The table, with base64 images, or in place of one the index of an earlier row that has it.
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
            lines = [f"{letter}. {text}" for letter, text in zip(_LETTERS, texts, strict=False)]
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
    rows = []
    for line, row in read_table(path):
        if missing := [name for name in _NEEDED if name not in row]:
            raise EvalError(f"{path}: has no column {', '.join(missing)}; expected {', '.join(_NEEDED)}")
        if not row["index"].isdigit():
            raise EvalError(f"{path}: line {line}: index {row['index'][:40]!r}, expected a number")
        rows.append((int(row["index"]), row))
    if not rows:
        raise EvalError(f"{path}: has no rows; load it again")
    return rows


def _is_none(cell: str) -> bool:
    return cell in _MISSING or cell.lower() == "none"


def _options(row: Mapping[str, str]) -> dict[str, str]:
    """Letters and texts up to the first missing one: as the public script, which drops an option whose text is none."""
    options = {}
    for letter in _LETTERS:
        if _is_none(row.get(letter, "")):
            break
        options[letter] = row[letter]
    return options


def _score(path: Path, answers: Sequence[Answer]) -> Score:
    """Circular accuracy (a question is right if all of its rotations are), and vanilla (the question as it is alone).

    The published value is the circular one, from a server that also asks a language model about answers that neither
    rule of `chosen_letter` reads; they count as wrong here, and are counted.
    """
    rows = dict(_rows(path))
    if not all(row.get("answer", "") in tuple(_LETTERS) for row in rows.values()):
        return Score(None, ["The table has no right answers: the server scores"], {})
    right: dict[int, dict[tuple[int, int], bool]] = defaultdict(dict)
    unread = 0
    for answer in answers:
        row = rows.get(answer.id)
        if row is None:
            continue
        options = _options(row)
        shown = answer.fields.get("option_char", list(options))  # what each letter of the prompt stands for
        texts = dict(zip(_LETTERS, (options.get(letter, "") for letter in shown), strict=False))
        letter = chosen_letter(answer.text, texts)
        unread += letter is None
        meant = None if letter is None else shown[_LETTERS.index(letter)]
        rotation = (answer.id // _ROTATION, answer.fields.get("round_id", 0))
        right[answer.id % _ROTATION][rotation] = meant == row["answer"]
    sizes = Counter(index % _ROTATION for index in rows)
    whole = [all(found.values()) for index, found in right.items() if len(found) >= sizes[index]]
    plain = [found[0, 0] for found in right.values() if (0, 0) in found]
    circular, vanilla = percent(sum(whole), len(whole)), percent(sum(plain), len(plain))
    lines = [
        f"Circular: {circular or 0:.2f}% of {len(whole)} questions",
        f"Vanilla: {vanilla or 0:.2f}% of {len(plain)} questions",
        f"Answers that name no option: {unread}",
    ]
    return Score(circular, lines, {"circular": circular, "vanilla": vanilla, "unread": unread})


def _export(path: Path, target: Path, answers: Sequence[Answer]) -> None:
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
    score_field="mmbench",
    folder="mmbench",
    questions="mmbench_dev_20230712.tsv",
    images=None,
    read=read_mmbench,
    published=4377,
    max_new_tokens=1024,
    convert_before_padding=False,
    score=_score,
    export=("mmbench_dev_upload.xlsx", _export),
    needs=("openpyxl",),
    remote="the MMBench server",
)
MMBENCH_TEST = replace(
    MMBENCH,
    name="mmbench_test",
    title="MMBench-EN (test)",
    score_field=None,
    questions="mmbench_test_20230712.tsv",
    published=None,
    score=None,
    export=("mmbench_test_upload.xlsx", _export),
)
MMBENCH_CN = replace(
    MMBENCH,
    name="mmbench_cn",
    title="MMBench-CN (dev)",
    score_field=None,
    questions="mmbench_dev_cn_20231003.tsv",
    read=partial(read_mmbench, instruction=_CHINESE),
    published=None,
    export=("mmbench_dev_cn_upload.xlsx", _export),
)
