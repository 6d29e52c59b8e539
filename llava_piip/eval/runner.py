"""Runs of benchmarks: questions answered by several processes, scores, files to send in.

`args` is what the command line of `python -m llava_piip.eval` says.
"""

from __future__ import annotations

import argparse
import hashlib
import shutil
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from accelerate import PartialState
from tqdm import tqdm

from ..inference import ChatModel
from .answering import answers_in_batches
from .answers import add_records, appending, check_complete, merge, read_answers, read_parts, record
from .benchmark import Benchmark, Question, Score
from .files import EvalError, read_json, write_json

__all__ = ["SCORES", "answer_benchmark", "score_answers"]

ANSWERS, SCORES, _SETTINGS, _PARTS = "answers.jsonl", "scores.json", "run.json", "parts"


def answer_benchmark(benchmark: Benchmark, args: argparse.Namespace, state: PartialState, model: ChatModel) -> Path:
    """Answers what is not answered yet, and returns the answers file. Every process calls it.

    Raises:
        EvalError: If the output folder has answers of another model or other questions.
        DataError: If an image is missing or broken; what was answered before stays.
    """
    folder = args.output / benchmark.name
    parts, model_id = folder / _PARTS, args.model.resolve().name
    questions = benchmark.read(benchmark.question_file(args.data))[: args.limit]
    if state.is_main_process:
        _begin(folder, _identity(benchmark, args, questions), restart=args.restart)
    _wait(state)
    with appending(parts / f"part-{state.process_index:05}.jsonl") as file:
        answered = {key: len(entries) for key, entries in read_parts(parts).items()}
        _wait(state)  # nobody writes before everybody knows what is left
        left = []
        for question in questions:
            if answered.get((question.id, question.prompt), 0):
                answered[question.id, question.prompt] -= 1
            else:
                left.append(question)
        own = left[state.process_index :: state.num_processes]
        batches = [own[start : start + args.batch_size] for start in range(0, len(own), args.batch_size)]
        images = benchmark.image_folder(args.data)
        texts = answers_in_batches(model, benchmark, images, batches, workers=args.workers)
        # Of several processes the first one tells its own progress, which is that of all
        among = f" (process 1 of {state.num_processes})" if state.num_processes > 1 else ""
        with tqdm(
            total=len(own), desc=benchmark.title + among, unit="question", disable=not state.is_main_process
        ) as bar:
            for batch, answers in zip(batches, texts, strict=True):
                pairs = zip(batch, answers, strict=True)
                add_records(file, [record(question, text, model_id) for question, text in pairs])
                bar.update(len(batch))
    _wait(state)
    if state.is_main_process:
        merge(questions, parts, folder / ANSWERS)
    _wait(state)
    return folder / ANSWERS


def score_answers(
    benchmark: Benchmark, args: argparse.Namespace, answers_file: Path
) -> tuple[Score | None, Path | None]:
    """Scores an answers file, and writes what is to be sent in or handed to official scripts.

    With `--partial`, lines that are no JSON are skipped, and missing answers are treated by the benchmark's own rule.
    With `--limit`, questions beyond it may be missing.

    Returns:
        The score, None where it comes from elsewhere; the written file, if the benchmark has one.

    Raises:
        EvalError: If the answers are incomplete or cannot be used.
    """
    questions_file, folder = benchmark.question_file(args.data), args.output / benchmark.name
    answers, skipped = read_answers(answers_file, skip_broken=args.partial)
    questions = benchmark.read(questions_file)
    if not args.partial:
        check_complete(questions[: args.limit], answers, str(answers_file))
    complete = len(answers) == len(questions)
    if skipped or not complete:
        print(
            f"{benchmark.title}: {len(answers)} answers to {len(questions)} questions, {skipped} lines skipped: "
            "this is no result to compare",
            file=sys.stderr,
        )
    folder.mkdir(parents=True, exist_ok=True)
    score, written = None, None
    if benchmark.export is not None:
        name, export = benchmark.export
        written = folder / name
        export(questions_file, written, answers)
    if benchmark.score is not None:
        score = benchmark.score(questions_file, answers)
        content = {"benchmark": benchmark.name, "complete": complete, **asdict(score)}
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
    path = folder / _SETTINGS
    if folder.is_dir() and not path.exists() and any(found.name != _PARTS for found in folder.iterdir()):
        raise EvalError(f"{folder}: holds other files than those of a run (no {_SETTINGS}): name another --output")
    if restart and folder.exists():
        shutil.rmtree(folder)
    if path.exists():
        before = read_json(path)
        if other := [name for name, value in identity.items() if before.get(name) != value]:
            differences = ", ".join(f"{name} was {before.get(name)!r}, is {identity[name]!r}" for name in other)
            raise EvalError(f"{folder} has answers of another run: {differences}; name another --output, or --restart")
        return
    (folder / _PARTS).mkdir(parents=True, exist_ok=True)
    write_json(path, identity, indent=2)


def _identity(benchmark: Benchmark, args: argparse.Namespace, questions: Sequence[Question]) -> dict[str, Any]:
    """What answers depend on: only answers of the same are put together."""
    weights = hashlib.sha256()
    for path in sorted(args.model.rglob("*.safetensors")):
        found = path.stat()
        weights.update(f"{path.relative_to(args.model)} {found.st_size} {found.st_mtime_ns}\n".encode())
    digest = hashlib.sha256(benchmark.question_file(args.data).read_bytes())
    return {
        "benchmark": benchmark.name,
        "model": args.model.resolve().name,
        "weights (names, sizes, times)": weights.hexdigest()[:16],
        "question file (SHA-256)": digest.hexdigest()[:16],
        "questions": len(questions),
        "max_new_tokens": benchmark.max_new_tokens,
        "dtype": args.dtype,
    }
