"""Checking the files of benchmarks before anything is answered: everything that is wrong, not only the first."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from piip_core.errors import ConfigError, UserError

from ..data.audit import Decode, image_findings, image_states, num_cores
from ..data.audit_report import UNUSABLE_FILE, AuditReport, Count, FileSummary, Finding
from ..data.images import ImageFolder, read_image
from ..data.problems import DataError, Problem
from .benchmark import Answer, Benchmark, Question
from .files import EvalError

__all__ = ["check_benchmarks", "missing_files"]


def missing_files(benchmark: Benchmark, question_file: Path, image_folder: Path | None) -> list[Path]:
    """Files and folders that a benchmark needs and that are not there."""
    files = [question_file, *(question_file.parent / name for name in benchmark.labels)]
    folders = [] if image_folder is None else [image_folder]
    return [path for path in files if not path.is_file()] + [path for path in folders if not path.is_dir()]


def check_benchmarks(
    benchmarks: Sequence[Benchmark],
    data: Path,
    *,
    decode: Decode = "header",
    workers: int | None = None,
    progress: bool = True,
) -> AuditReport:
    """Checks questions, labels and images of benchmarks.

    Files are there and can be read, the number of questions is the published one, no question is asked twice, the
    labels belong to the questions (a trial answer to every question is scored, and written to send in), and images
    exist and can be read.

    Args:
        benchmarks: What to check.
        data: Folder of all benchmarks.
        decode: How far images are read; see `llava_piip.data.audit.audit`.
        workers: Number of processes for the images; by default one per core.
        progress: Show progress bars.
    """
    report = AuditReport(decode)
    for benchmark in benchmarks:
        question_file, image_folder = benchmark.question_file(data), benchmark.image_folder(data)
        summary = FileSummary(str(question_file), str(image_folder or question_file))
        report.files.append(summary)
        if missing := missing_files(benchmark, question_file, image_folder):
            kinds = ((path, "docs/evaluation.md says where it comes from") for path in missing)
            report.findings += [_unusable(question_file, f"{path}: missing; {advice}") for path, advice in kinds]
        try:
            questions = benchmark.read(question_file)
        except (EvalError, DataError) as error:
            if question_file not in missing:
                report.findings.append(_unusable(question_file, str(error)))
            continue
        summary.entries = len(questions)
        summary.with_image = sum(question.image is not None for question in questions)
        summary.text_only = len(questions) - summary.with_image
        if benchmark.published is not None:
            summary.counts.append(Count(f"{benchmark.title}: questions", len(questions), benchmark.published))
        report.findings += _repeated(question_file, questions)
        if not missing:
            report.findings += _trial(benchmark, question_file, questions)
        folder = ImageFolder(image_folder, follow_links=True) if image_folder and image_folder.is_dir() else None
        report.findings += _image_problems(summary, questions, folder, decode, workers or num_cores(), progress)
    return report


def _unusable(file: Path, message: str) -> Finding:
    return Finding(str(file), None, None, UNUSABLE_FILE, None, message)


def _repeated(file: Path, questions: Sequence[Question]) -> Iterator[Finding]:
    first: dict[tuple[int | str, str], int] = {}
    for number, question in enumerate(questions):
        before = first.setdefault((question.id, question.prompt), number)
        if before != number:
            message = f"{file}: question {number} (id {question.id!r}) is question {before} again: it would count twice"
            yield Finding(str(file), number, str(question.id), Problem.RECORD.value, None, message)


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


def _image_problems(
    summary: FileSummary,
    questions: Sequence[Question],
    folder: ImageFolder | None,
    decode: Decode,
    workers: int,
    progress: bool,
) -> Iterator[Finding]:
    """Findings about images, and their numbers in the summary."""
    users: dict[str, list[tuple[int, str]]] = {}
    for number, question in enumerate(questions):
        if isinstance(question.image, str):
            users.setdefault(question.image, []).append((number, str(question.id)))
        elif question.image is not None:
            summary.images_by_folder["(in the file)"] += 1
            try:
                if decode != "none":
                    read_image(question.image, f"the image of question {question.id}")
            except DataError as error:
                summary.unusable_by_folder["(in the file)"] += 1
                message = f"{summary.file}: {error}"
                yield Finding(summary.file, number, str(question.id), error.problem.value, None, message)
    if folder is None:
        return
    for name, state in image_states(list(users), folder, decode, workers, progress):
        parent = str(Path(name).parent)
        summary.images_by_folder[parent] += 1
        summary.unusable_by_folder[parent] += state.problem is not None
        summary.entries_by_folder[parent] += len(users[name])
        yield from image_findings(summary.file, name, state, users[name])
