"""Checking the files of benchmarks before anything is answered: everything that is wrong, not only the first."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from piip_core.errors import UserError

from ..data.audit import UNUSABLE_FILE, AuditReport, Decode, FileSummary, Finding, image_findings
from ..data.images import ImageFolder, read_image
from ..data.records import DataError, Problem
from .benchmark import SOURCES, Answer, Benchmark, Question


def check_benchmarks(
    benchmarks: Sequence[Benchmark], data: Path, *, decode: Decode = "header", workers: int | None = None
) -> AuditReport:
    """Checks questions, labels and images of benchmarks below a folder; `decode` and `workers` are those of `audit`.

    Files are there and can be read, the number of questions is the published one, no question is asked twice, the
    labels belong to the questions (a trial answer to every question is scored, and written to send in), and images
    exist and can be read.
    """
    report = AuditReport(decode)
    for benchmark in benchmarks:
        file, folder = benchmark.question_file(data), benchmark.image_folder(data)
        summary = FileSummary(str(file), str(folder or file))
        report.files.append(summary)
        missing = benchmark.missing_files(data)
        report.problems += [_unusable(file, f"{path}: missing; {SOURCES}") for path in missing]
        try:
            questions = benchmark.read(file)
        except UserError as error:
            if file not in missing:
                report.problems.append(_unusable(file, str(error)))
            continue
        summary.entries = len(questions)
        summary.with_image = sum(question.image is not None for question in questions)
        summary.text_only = len(questions) - summary.with_image
        summary.counts.append((f"{benchmark.title}: questions", len(questions), benchmark.published))
        report.problems += _repeated(file, questions)
        if not missing:
            report.problems += _trial(benchmark, file, questions)
        report.problems += _embedded_images(summary, questions, decode)
        if folder is not None and folder.is_dir():
            users: dict[str, list[tuple[int, str]]] = {}
            for index, question in enumerate(questions):
                if isinstance(question.image, str):
                    users.setdefault(question.image, []).append((index, f"{file}: question {question.id!r}"))
                    summary.entries_by_folder[str(Path(question.image).parent)] += 1
            images = ImageFolder(folder, follow_links=True)
            report.problems += image_findings(summary, users, images, decode, workers, lambda n: str(Path(n).parent))
    return report


def _unusable(file: Path, message: str) -> Finding:
    return Finding(str(file), None, UNUSABLE_FILE, message)


def _repeated(file: Path, questions: Sequence[Question]) -> Iterator[Finding]:
    first: dict[tuple[int | str, str], int] = {}
    for index, question in enumerate(questions):
        before = first.setdefault((question.id, question.prompt), index)
        if before != index:
            message = f"{file}: question {index} (id {question.id!r}) is question {before} again: it would count twice"
            yield Finding(str(file), index, Problem.RECORD.value, message)


def _trial(benchmark: Benchmark, file: Path, questions: Sequence[Question]) -> Iterator[Finding]:
    answers = [Answer(question.id, question.prompt, "A") for question in questions]
    try:
        if benchmark.score is not None:
            benchmark.score(file, answers)
        if benchmark.export is not None:
            name, export = benchmark.export
            with tempfile.TemporaryDirectory() as folder:
                export(file, Path(folder, name), answers)
    except UserError as error:
        yield _unusable(file, f"labels do not fit the questions: {error}")


def _embedded_images(summary: FileSummary, questions: Sequence[Question], decode: Decode) -> Iterator[Finding]:
    """Findings about images that the question file holds, and their numbers in the summary."""
    for index, question in enumerate(questions):
        if isinstance(question.image, bytes):
            summary.images_by_folder["(in the file)"] += 1
            try:
                if decode != "none":
                    read_image(question.image, f"the image of question {question.id}")
            except DataError as error:
                summary.unusable_by_folder["(in the file)"] += 1
                yield Finding(summary.file, index, error.problem.value, f"{summary.file}: {error}")
