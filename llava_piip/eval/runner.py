"""Runs of benchmarks: questions answered by several processes, scores, files to send in."""

from __future__ import annotations

import hashlib
import shutil
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import timedelta
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from tqdm import tqdm

from ..inference import DTYPES, ChatModel
from .answering import Preparation, answers_in_batches
from .answers import Part, check_complete, merge_parts, parts_of, read_answers, record
from .benchmark import Benchmark, Question, Score
from .files import EvalError, read_json, write_json

__all__ = [
    "SCORES",
    "RunSettings",
    "answer_benchmark",
    "default_dtype",
    "load_model",
    "process_state",
    "score_answers",
]

ANSWERS, SCORES, _SETTINGS, _PARTS = "answers.jsonl", "scores.json", "run.json", "parts"
_LONGEST_WAIT = timedelta(days=7)  # of a process for the others


@dataclass(frozen=True)
class RunSettings:
    """What a run of a benchmark is asked for.

    Attributes:
        data: Folder of all benchmarks.
        output: Folder of all results of the model.
        questions: Question file instead of the benchmark's own.
        images: Image folder instead of the benchmark's own.
        batch_size: Questions answered together.
        workers: Processes per process that read images.
        limit: Answer only that many questions, to try things.
        restart: Forget earlier answers.
        partial: Score incomplete answers.
    """

    data: Path
    output: Path
    questions: Path | None = None
    images: Path | None = None
    batch_size: int = 1
    workers: int = 2
    limit: int | None = None
    restart: bool = False
    partial: bool = False

    def question_file(self, benchmark: Benchmark) -> Path:
        """The question file of a benchmark."""
        return self.questions or benchmark.question_file(self.data)

    def folder(self, benchmark: Benchmark) -> Path:
        """Where the results of a benchmark go."""
        return self.output / benchmark.name


def process_state(*, cpu: bool) -> PartialState:
    """This process among those that torchrun started, or alone."""
    return PartialState(cpu=cpu, timeout=_LONGEST_WAIT)


def default_dtype(device: torch.device) -> str:
    """The precision of the published results on a GPU; single precision elsewhere, where half is slow."""
    return "float16" if device.type == "cuda" else "float32"


def load_model(folder: Path, state: PartialState, dtype: str) -> ChatModel:
    """Loads the model onto this process's device."""
    return ChatModel.load(folder, device=state.device, dtype=DTYPES[dtype])


def read_questions(benchmark: Benchmark, settings: RunSettings) -> list[Question]:
    """The questions to answer."""
    return benchmark.read(settings.question_file(benchmark))[: settings.limit]


def answer_benchmark(
    benchmark: Benchmark,
    settings: RunSettings,
    state: PartialState,
    model: ChatModel,
    *,
    model_folder: Path,
    dtype: str,
) -> Path:
    """Answers what is not answered yet, and returns the answers file. Every process calls it.

    Raises:
        EvalError: If the output folder has answers of another model or other questions.
        DataError: If an image is missing or broken; what was answered before stays.
    """
    folder = settings.folder(benchmark)
    questions = read_questions(benchmark, settings)
    if state.is_main_process:
        _begin(folder, _identity(benchmark, settings, questions, model_folder, dtype), restart=settings.restart)
    _wait(state)
    parts = parts_of(questions, folder / _PARTS)
    answered = [part.answered() for part in parts]
    _wait(state)  # nobody writes before everybody knows what is left
    left = [(part, done) for part, done in zip(parts, answered, strict=True) if done < len(part.questions)]
    preparation = Preparation.of(benchmark, model.processor, settings.images or benchmark.image_folder(settings.data))
    _answer_parts(left[state.process_index :: state.num_processes], model, preparation, settings, state, model_folder)
    _wait(state)
    if state.is_main_process:
        merge_parts(parts, folder / ANSWERS)
    _wait(state)
    return folder / ANSWERS


def _answer_parts(
    parts: Sequence[tuple[Part, int]],
    model: ChatModel,
    preparation: Preparation,
    settings: RunSettings,
    state: PartialState,
    model_folder: Path,
) -> None:
    """Answers the parts of this process. Batches stay within a part, so that its file is always its first answers."""
    batches = [
        [
            part.questions[start : start + settings.batch_size]
            for start in range(done, len(part.questions), settings.batch_size)
        ]
        for part, done in parts
    ]
    # Of several processes the first one tells its own progress, which is that of all
    among = f" (process 1 of {state.num_processes})" if state.num_processes > 1 else ""
    bar = tqdm(
        total=sum(len(batch) for group in batches for batch in group),
        desc=preparation.benchmark.title + among,
        unit="question",
        disable=not state.is_main_process,
    )
    model_id = model_folder.resolve().name
    texts = answers_in_batches(model, preparation, list(chain.from_iterable(batches)), workers=settings.workers)
    with bar:
        for (part, done), group in zip(parts, batches, strict=True):
            with part.appending(done) as writer:
                for batch in group:
                    lines = zip(batch, next(texts), strict=True)
                    writer.write(record(question, text, model_id) for question, text in lines)
                    bar.update(len(batch))


def score_answers(benchmark: Benchmark, settings: RunSettings, answers_file: Path) -> tuple[Score | None, Path | None]:
    """Scores an answers file, and writes what is to be sent in or handed to official scripts.

    Args:
        benchmark: The benchmark.
        settings: With `partial`, lines that are no JSON are skipped, and missing answers are treated by the
            benchmark's own rule. With `limit`, questions beyond it may be missing.
        answers_file: In LLaVA-1.5's format, of this program or another one.

    Returns:
        The score, None where it comes from elsewhere; the written file, if the benchmark has one.

    Raises:
        EvalError: If the answers are incomplete or cannot be used.
    """
    question_file, folder = settings.question_file(benchmark), settings.folder(benchmark)
    answers, skipped = read_answers(answers_file, skip_broken=settings.partial)
    questions = benchmark.read(question_file)
    if not settings.partial:
        check_complete(questions[: settings.limit], answers, str(answers_file))
    if skipped or len(answers) != len(questions):
        print(
            f"{benchmark.title}: {len(answers)} answers to {len(questions)} questions, {skipped} lines skipped: "
            "this is no result to compare",
            file=sys.stderr,
        )
    folder.mkdir(parents=True, exist_ok=True)
    written = None
    if benchmark.export is not None:
        name, export = benchmark.export
        written = folder / name
        export(question_file, written, answers)
    score = None
    if benchmark.score is not None:
        score = benchmark.score(question_file, answers)
        content = {"benchmark": benchmark.name, "complete": len(answers) == len(questions), **asdict(score)}
        write_json(folder / SCORES, content, indent=2)
    return score, written


def _wait(state: PartialState) -> None:
    """Waits until every process is here.

    Raises:
        EvalError: If one of them has ended.
    """
    try:
        state.wait_for_everyone()
    except RuntimeError as error:  # the backends have different subclasses, or none
        raise EvalError("another process has ended; its message says why. The same command goes on") from error


def _begin(folder: Path, identity: dict[str, Any], *, restart: bool) -> None:
    """Makes the folder of a run, or makes sure that it is the one to go on with."""
    if restart and folder.exists():
        shutil.rmtree(folder)
    path = folder / _SETTINGS
    if path.exists():
        before = read_json(path)
        if other := [name for name, value in identity.items() if before.get(name) != value]:
            differences = ", ".join(f"{name} was {before.get(name)!r}, is {identity[name]!r}" for name in other)
            raise EvalError(f"{folder} has answers of another run: {differences}; name another --output, or --restart")
        return
    (folder / _PARTS).mkdir(parents=True, exist_ok=True)
    write_json(path, identity, indent=2)


def _identity(
    benchmark: Benchmark, settings: RunSettings, questions: Sequence[Question], model_folder: Path, dtype: str
) -> dict[str, Any]:
    """What answers depend on: only answers of the same are put together."""
    digest, weights = hashlib.sha256(), hashlib.sha256()
    with settings.question_file(benchmark).open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    for path in sorted(model_folder.rglob("*.safetensors")):
        found = path.stat()
        weights.update(f"{path.relative_to(model_folder)} {found.st_size} {found.st_mtime_ns}\n".encode())
    return {
        "benchmark": benchmark.name,
        "model": model_folder.resolve().name,
        "weights (names, sizes, times)": weights.hexdigest()[:16],
        "question file (SHA-256)": digest.hexdigest()[:16],
        "questions": len(questions),
        "max_new_tokens": benchmark.max_new_tokens,
        "dtype": dtype,
    }
