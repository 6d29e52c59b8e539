"""Checking the files of benchmarks before anything is answered: everything that is wrong, not only the first."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from piip_core.errors import ConfigError, UserError

from ..data.audit import Decode, image_findings
from ..data.audit_report import UNUSABLE_FILE, AuditReport, Count, FileSummary, Finding
from ..data.images import ImageFolder, read_image
from ..data.problems import DataError, Problem
from .benchmark import Answer, Benchmark, Question
from .files import EvalError

__all__ = ["check_benchmarks", "missing_files"]


def missing_files(benchmark: Benchmark, data: Path, *, with_images: bool = True) -> list[Path]:
    """Files and folders that a benchmark needs and that are not there."""
    questions, images = benchmark.question_file(data), benchmark.image_folder(data)
    files = [questions, *(questions.parent / name for name in benchmark.labels)]
    missing = [path for path in files if not path.is_file()]
    return missing + [images] if with_images and images is not None and not images.is_dir() else missing


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
        missing = missing_files(benchmark, data)
        report.findings += [
            _unusable(file, f"{path}: missing; docs/evaluation.md says where it comes from") for path in missing
        ]
        try:
            questions = benchmark.read(file)
        except (EvalError, DataError) as error:
            if file not in missing:
                report.findings.append(_unusable(file, str(error)))
            continue
        summary.entries = len(questions)
        summary.with_image = sum(question.image is not None for question in questions)
        summary.text_only = len(questions) - summary.with_image
        if benchmark.published is not None:
            summary.counts.append(Count(f"{benchmark.title}: questions", len(questions), benchmark.published))
        report.findings += _repeated(file, questions)
        if not missing:
            report.findings += _trial(benchmark, file, questions)
        report.findings += _embedded_images(summary, questions, decode)
        if folder is not None and folder.is_dir():
            users: dict[str, list[tuple[int, str]]] = {}
            for index, question in enumerate(questions):
                if isinstance(question.image, str):
                    users.setdefault(question.image, []).append((index, str(question.id)))
            for name, entries in users.items():
                summary.entries_by_folder[str(Path(name).parent)] += len(entries)
            images = ImageFolder(folder, follow_links=True)
            report.findings += image_findings(summary, users, images, decode, workers, lambda n: str(Path(n).parent))
    return report


def _unusable(file: Path, message: str) -> Finding:
    return Finding(str(file), None, None, UNUSABLE_FILE, None, message)


def _repeated(file: Path, questions: Sequence[Question]) -> Iterator[Finding]:
    first: dict[tuple[int | str, str], int] = {}
    for index, question in enumerate(questions):
        before = first.setdefault((question.id, question.prompt), index)
        if before != index:
            message = f"{file}: question {index} (id {question.id!r}) is question {before} again: it would count twice"
            yield Finding(str(file), index, str(question.id), Problem.RECORD.value, None, message)


def _trial(benchmark: Benchmark, file: Path, questions: Sequence[Question]) -> Iterator[Finding]:
    answers = [Answer(q.id, q.prompt, "A", dict(q.fields)) for q in questions]
    try:
        if benchmark.score is not None:
            benchmark.score(file, answers)
        if benchmark.export is not None:
            name, export = benchmark.export
            with tempfile.TemporaryDirectory() as folder:
                export(file, Path(folder, name), answers)
    except (ConfigError, UserError) as error:
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
                message = f"{summary.file}: {error}"
                yield Finding(summary.file, index, str(question.id), error.problem.value, None, message)
