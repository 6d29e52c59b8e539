"""Answers files: those that processes write and a killed run goes on with, and the file made of them."""

from __future__ import annotations

import fcntl
import json
import os
import secrets
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from piip_core.files import write_atomically

from .benchmark import Answer, Question
from .files import EvalError, read_json_lines

__all__ = ["add_records", "appending", "check_complete", "merge", "read_answers", "read_parts", "record"]

_ANSWER = {"question_id": (int, str), "prompt": str, "text": str}


@contextmanager
def appending(path: Path) -> Iterator[int]:
    """Opens a file to add answers, and yields its descriptor; half a line of a killed process goes.

    Raises:
        EvalError: If another run writes to it.
    """
    with open(path, "ab") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise EvalError(f"{path}: another run is writing answers here; wait for its end") from None
        file.truncate(path.read_bytes().rfind(b"\n") + 1)
        yield file.fileno()


def add_records(descriptor: int, records: Iterable[Mapping[str, Any]]) -> None:
    """Adds records at the end of an open file; they are on the disk when it returns."""
    content = memoryview("".join(json.dumps(entry) + "\n" for entry in records).encode())
    while content:
        content = content[os.write(descriptor, content) :]
    os.fsync(descriptor)


def record(question: Question, text: str, model_id: str) -> dict[str, Any]:
    """The line of an answers file in LLaVA-1.5's format."""
    fields = dict(question.fields)
    start = {"question_id": question.id, "prompt": question.prompt, "text": text}
    if "round_id" in fields:  # the one benchmark with more fields has this one second
        start = {"question_id": question.id, "round_id": fields.pop("round_id"), **start}
    end = {"answer_id": secrets.token_urlsafe(16), "model_id": model_id, "metadata": {}}
    return start | fields | end


def read_parts(folder: Path) -> dict[tuple[int | str, str], list[dict[str, Any]]]:
    """The records in the files of a folder by id and prompt of their questions.

    Raises:
        EvalError: If a file cannot be used.
    """
    found: dict[tuple[int | str, str], list[dict[str, Any]]] = {}
    for path in sorted(folder.glob("*.jsonl")):
        for _, entry in read_json_lines(path, _ANSWER, only_ended=True):
            found.setdefault((entry["question_id"], entry["prompt"]), []).append(entry)
    return found


def merge(questions: Sequence[Question], folder: Path, target: Path) -> None:
    """Writes the answers in the files of a folder into one, in the order of the questions.

    Raises:
        EvalError: If one is missing, or an answer is to no question.
    """
    found = read_parts(folder)
    check_complete(questions, [_answer(entry) for entries in found.values() for entry in entries], str(folder))
    with write_atomically(target, "w") as file:
        for question in questions:
            file.write(json.dumps(found[question.id, question.prompt].pop(0)) + "\n")


def read_answers(path: Path, *, skip_broken: bool = False) -> tuple[list[Answer], int]:
    """The answers of a file in LLaVA-1.5's format, and how many lines were skipped because they are no JSON.

    Raises:
        EvalError: If the file or a line cannot be used, or skipped.
    """
    broken: list[int] | None = [] if skip_broken else None
    answers = [_answer(entry) for _, entry in read_json_lines(path, _ANSWER, broken=broken)]
    return answers, len(broken or [])


def _answer(entry: Mapping[str, Any]) -> Answer:
    others = {key: value for key, value in entry.items() if key not in _ANSWER}
    return Answer(entry["question_id"], entry["prompt"], entry["text"], others)


def check_complete(questions: Sequence[Question], answers: Sequence[Answer], where: str) -> None:
    """Refuses answers that leave questions out, answer one twice, or answer others.

    Raises:
        EvalError: With the numbers and the first examples.
    """
    asked, found = (Counter((entry.id, entry.prompt) for entry in entries) for entries in (questions, answers))
    faults = {
        "questions have no answer": asked - found,
        "answers are to no question of the benchmark, or to one that is answered already": found - asked,
    }
    for fault, entries in faults.items():
        if entries:
            raise EvalError(
                f"{where}: {entries.total()} {fault}, such as {next(iter(entries))[0]!r}; complete the file, or allow "
                "that with --partial"
            )
