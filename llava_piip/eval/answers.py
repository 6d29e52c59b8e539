"""Answers files: parts that several processes write and a killed run goes on with, and the file made of them."""

from __future__ import annotations

import fcntl
import json
import math
import os
import secrets
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from piip_core.files import write_atomically

from .benchmark import Answer, Question
from .files import EvalError, field, read_json_lines

__all__ = ["Part", "PartWriter", "check_complete", "merge_parts", "parts_of", "read_answers", "record"]

# Parts are enough for many processes, and do not depend on their number: a run can go on with another one
_SMALLEST_PART, _MOST_PARTS = 16, 256


@dataclass(frozen=True)
class Part:
    """Consecutive questions, and the file that their answers go to, one line after the other.

    Attributes:
        path: The file.
        questions: The questions.
    """

    path: Path
    questions: Sequence[Question]

    def answered(self) -> int:
        """Number of questions that have their answer in the file.

        Raises:
            EvalError: If the file has answers to other questions, or more of them.
        """
        if not self.path.exists():
            return 0
        lines = read_json_lines(self.path, only_ended=True)
        answers = [_answer(entry, f"{self.path}: line {line}") for line, entry in lines]
        for number, answer in enumerate(answers):
            asked = self.questions[number] if number < len(self.questions) else None
            if asked is None or (asked.id, asked.prompt) != (answer.id, answer.prompt):
                raise EvalError(
                    f"{self.path}: line {number + 1} answers the question {answer.id!r}, not the one of this place: "
                    "the questions have changed since; name another --output, or --restart"
                )
        return len(answers)

    @contextmanager
    def appending(self, answered: int) -> Iterator[PartWriter]:
        """Opens the file to add answers, for one process at a time; half a line of a killed process goes.

        Args:
            answered: Number of answers that are to be there.

        Raises:
            EvalError: If another process writes to it, or has done so meanwhile.
        """
        with open(self.path, "ab") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise EvalError(f"{self.path}: another run is writing answers here; wait for its end") from None
            file.truncate(_whole_lines(self.path))
            if self.answered() != answered:
                raise EvalError(f"{self.path}: another run has written answers here meanwhile; start one at a time")
            yield PartWriter(file.fileno())


class PartWriter:
    """Adds answers to an open file, which are on the disk when `write` returns."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor

    def write(self, records: Iterable[dict[str, Any]]) -> None:
        """Adds records at the end."""
        content = memoryview("".join(json.dumps(entry) + "\n" for entry in records).encode())
        while content:
            content = content[os.write(self._descriptor, content) :]
        os.fsync(self._descriptor)


def _whole_lines(path: Path) -> int:
    """Size of a file up to its last complete line."""
    return path.read_bytes().rfind(b"\n") + 1


def parts_of(questions: Sequence[Question], folder: Path, size: int | None = None) -> list[Part]:
    """Divides questions into parts of a size, the last of which may be smaller.

    Args:
        questions: The questions.
        folder: Where the files of the parts lie.
        size: Questions per part; by default, what makes at most 256 parts of 16 or more.
    """
    size = size or max(_SMALLEST_PART, math.ceil(len(questions) / _MOST_PARTS))
    starts = range(0, len(questions), size)
    return [
        Part(folder / f"part-{number:05}.jsonl", questions[start : start + size]) for number, start in enumerate(starts)
    ]


def record(question: Question, text: str, model_id: str) -> dict[str, Any]:
    """The line of an answers file in LLaVA-1.5's format."""
    fields = dict(question.fields)
    start = {"question_id": question.id, "prompt": question.prompt, "text": text}
    if "round_id" in fields:  # the one benchmark with more fields has this one second
        start = {"question_id": question.id, "round_id": fields.pop("round_id"), **start}
    end = {"answer_id": secrets.token_urlsafe(16), "model_id": model_id, "metadata": {}}
    return start | fields | end


def merge_parts(parts: Sequence[Part], target: Path) -> None:
    """Writes the answers of complete parts into one file, in the order of the questions.

    Raises:
        EvalError: If a part is not complete.
    """
    for part in parts:
        if (found := part.answered()) != len(part.questions):
            raise EvalError(f"{part.path}: {found} of {len(part.questions)} answers; run the same command to go on")
    with write_atomically(target) as file:
        for part in parts:
            file.write(part.path.read_bytes())


def read_answers(path: Path, *, skip_broken: bool = False) -> tuple[list[Answer], int]:
    """The answers of a file, and the number of lines that were skipped.

    Args:
        path: A file in LLaVA-1.5's format, of this program or another one.
        skip_broken: Whether lines that are no JSON are skipped; they are an error otherwise.

    Raises:
        EvalError: If the file or a line cannot be used.
    """
    broken: list[int] | None = [] if skip_broken else None
    lines = read_json_lines(path, broken=broken)
    answers = [_answer(entry, f"{path}: line {line}") for line, entry in lines]
    return answers, len(broken or [])


def _answer(entry: dict[str, Any], where: str) -> Answer:
    name, prompt = (field(entry, key, types, where) for key, types in (("question_id", (int, str)), ("prompt", str)))
    others = {key: value for key, value in entry.items() if key not in ("question_id", "prompt", "text")}
    return Answer(name, prompt, field(entry, "text", str, where), others)


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
