"""Checking the files of benchmarks before anything is answered: everything that is wrong, not only the first."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path

from piip_core.audit import Audit, SetAudit
from piip_core.errors import UserError

from ..data.audit import READING, UNUSABLE_FILE, Decode, audit_images
from ..data.images import ImageFolder, read_image
from ..data.records import DataError, Problem
from .benchmark import SOURCES, Answer, Benchmark, Question


def check_benchmarks(
    benchmarks: Sequence[Benchmark], data: Path, *, decode: Decode = "header", workers: int | None = None
) -> Audit:
    """Checks questions, labels and images of benchmarks below a folder; `decode` and `workers` are those of `audit`.

    Files are there and can be read, the number of questions is the published one, no question is asked twice, the
    labels belong to the questions (a trial answer to every question is scored, and written to send in), and images
    exist and can be read.
    """
    sets: list[SetAudit] = []
    for benchmark in benchmarks:
        file, folder = benchmark.question_file(data), benchmark.image_folder(data)
        result = SetAudit(benchmark.title, benchmark.published)
        sets.append(result)
        missing = benchmark.missing_files(data)
        for path in missing:
            result.add(UNUSABLE_FILE, path, f"{path}: missing; {SOURCES}")
        try:
            questions = benchmark.read(file)
        except UserError as error:
            if file not in missing:
                result.add(UNUSABLE_FILE, file, str(error))
            continue
        result.found = len(questions)
        result.compare("questions", file, len(questions), benchmark.published)
        _check_questions(result, file, questions, decode)
        if not missing:
            _try_answers(result, benchmark, file, questions)
        if folder is not None and folder.is_dir():
            users: dict[str, list[tuple[int, str]]] = {}
            for index, question in enumerate(questions):
                if isinstance(question.image, str):
                    users.setdefault(question.image, []).append((index, f"{file}: question {question.id!r}"))
            sets += audit_images(users, ImageFolder(folder, follow_links=True), decode, workers)
    return Audit(sets, READING[decode])


def _check_questions(result: SetAudit, file: Path, questions: Sequence[Question], decode: Decode) -> None:
    """Finds questions that are asked twice, and broken images that the question file holds."""
    first: dict[tuple[int | str, str], int] = {}
    for index, question in enumerate(questions):
        before = first.setdefault((question.id, question.prompt), index)
        if before != index:
            message = f"{file}: question {index} (id {question.id!r}) is question {before} again: it would count twice"
            result.add(Problem.RECORD.value, file, message, index)
        if isinstance(question.image, bytes) and decode != "none":
            try:
                read_image(question.image, f"the image of question {question.id}")
            except DataError as error:
                result.add(error.problem.value, file, f"{file}: {error}", index)


def _try_answers(result: SetAudit, benchmark: Benchmark, file: Path, questions: Sequence[Question]) -> None:
    """Finds labels that do not belong to the questions."""
    answers = [Answer(question.id, question.prompt, "A") for question in questions]
    try:
        if benchmark.score is not None:
            benchmark.score(file, answers)
        if benchmark.export is not None:
            name, export = benchmark.export
            with tempfile.TemporaryDirectory() as folder:
                export(file, Path(folder, name), answers)
    except UserError as error:
        result.add(UNUSABLE_FILE, file, f"labels do not fit the questions: {error}")
