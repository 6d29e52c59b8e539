"""Runs of benchmarks: questions answered by several processes, scores, files to send in.

`args` is what the command line of `python -m llava_piip.eval` says.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import secrets
import shutil
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from PIL import Image
from torch.utils.data import DataLoader
from tqdm import tqdm
from transformers import BatchFeature

from piip_core.errors import UserError
from piip_core.files import LOCK_NAME, write_atomically
from piip_core.training_checkpoints import lock_run

from ..conversation import IMAGE_TAG, render_conversation
from ..data.images import ImageFolder, read_image
from ..inference import ChatModel
from ..processing import PIIPLlavaProcessor
from .benchmark import Answer, Benchmark, EvalError, Question, Score, read_json, read_json_lines, write_json

ANSWERS, SCORES, _SETTINGS, _PARTS = "answers.jsonl", "scores.json", "run.json", "parts"
_ANSWER = {"question_id": (int, str), "prompt": str, "text": str}


def default_dtype(device: torch.device) -> str:
    """The precision of the published results on a GPU; single precision elsewhere, where half is slow."""
    return "float16" if device.type == "cuda" else "float32"


def prompt_of(question: Question, *, chat_template: str, tokenizer: Any = None) -> str:
    """The prompt that a question is asked with: a conversation of its own, the image first."""
    text = question.text if question.image is None else f"{IMAGE_TAG}\n{question.text}"
    messages = [{"role": "user", "content": text}]
    options = {"chat_template": chat_template, "tokenizer": tokenizer}
    return render_conversation(messages, **options, add_generation_prompt=True)[0]


def image_of(question: Question, benchmark: Benchmark, images: ImageFolder | None) -> Image.Image:
    """The image of a question that has one."""
    convert = benchmark.convert_before_padding
    if isinstance(question.image, bytes):
        return read_image(question.image, f"the image of question {question.id}", convert=convert)
    return images.open(question.image, convert=convert)


def answer_benchmark(benchmark: Benchmark, args: argparse.Namespace, state: PartialState, model: ChatModel) -> Path:
    """Answers what is not answered yet, and returns the answers file. Every process calls it."""
    folder = args.output / benchmark.name
    parts, model_id = folder / _PARTS, args.model.resolve().name
    questions = benchmark.read(benchmark.question_file(args.data))[: args.limit]
    with lock_run(folder, "name another --output"):
        if state.is_main_process:
            _begin(folder, _identity(benchmark, args, questions), restart=args.restart)
        _wait(state)
        answered = _read_parts(parts)
        left = [question for question in questions if (question.id, question.prompt) not in answered]
        _wait(state)  # nobody writes before everybody knows what is left
        own = left[state.process_index :: state.num_processes]
        batches = [own[start : start + args.batch_size] for start in range(0, len(own), args.batch_size)]
        texts = _answers(model, benchmark, benchmark.image_folder(args.data), batches, workers=args.workers)
        # Of several processes the first one tells its own progress, which is that of all
        among = f" (process 1 of {state.num_processes})" if state.num_processes > 1 else ""
        bar = tqdm(total=len(own), desc=benchmark.title + among, unit="question", disable=not state.is_main_process)
        with open(parts / f"part-{state.process_index:05}.jsonl", "a") as file, bar:
            for batch, answers in zip(batches, texts, strict=True):
                _add([record(*pair, model_id) for pair in zip(batch, answers, strict=True)], file)
                bar.update(len(batch))
        _wait(state)
        if state.is_main_process:
            answered = _read_parts(parts)
            with write_atomically(folder / ANSWERS, "w") as file:
                file.writelines(json.dumps(answered[q.id, q.prompt]) + "\n" for q in questions)
        _wait(state)
    return folder / ANSWERS


def _answers(
    model: ChatModel, benchmark: Benchmark, folder: Path | None, batches: Sequence[Sequence[Question]], *, workers: int
) -> Iterator[list[str]]:
    """Answers batches of questions one after the other, greedily; images are read by worker processes meanwhile."""
    # Images of the archives are links to one copy in many installations
    images = None if folder is None else ImageFolder(folder, follow_links=True)
    prepare = partial(_prepare, benchmark, model.processor, images)
    for inputs in DataLoader(batches, batch_size=None, collate_fn=prepare, num_workers=workers):
        if isinstance(inputs, UserError):
            raise inputs
        yield model.generate(inputs, max_new_tokens=benchmark.max_new_tokens)


def _prepare(
    benchmark: Benchmark, processor: PIIPLlavaProcessor, folder: ImageFolder | None, questions: Sequence[Question]
) -> BatchFeature | UserError:
    """What the model takes of questions, or what is wrong, such as a missing image: raised, it would be a traceback."""
    template, tokenizer = processor.chat_template, processor.tokenizer
    try:
        prompts = [prompt_of(question, chat_template=template, tokenizer=tokenizer) for question in questions]
        # A tag that a question has itself is one more placeholder, with the same image, as in the published results
        images = [
            [] if question.image is None else [image_of(question, benchmark, folder)] * prompt.count(IMAGE_TAG)
            for question, prompt in zip(questions, prompts, strict=True)
        ]
        convert = benchmark.convert_before_padding
        return processor(text=prompts, images=images, convert_before_padding=convert)
    except UserError as error:
        return error


def _wait(state: PartialState) -> None:
    """Waits until every process is here."""
    try:
        state.wait_for_everyone()
    except RuntimeError as error:  # the backends have different subclasses, or none
        raise EvalError("another process has ended; its message says why. The same command goes on") from error


def _begin(folder: Path, identity: dict[str, Any], *, restart: bool) -> None:
    """Makes the folder of a run, or makes sure that it is the one to go on with."""
    settings, parts = folder / _SETTINGS, folder / _PARTS
    content = [path for path in folder.iterdir() if path.name != LOCK_NAME]
    if content and settings not in content:
        raise EvalError(f"{folder}: holds other files than those of a run (no {_SETTINGS}): name another --output")
    for path in content if restart else ():
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    if settings.exists():
        before = read_json(settings)
        if other := [name for name, value in identity.items() if before.get(name) != value]:
            differences = ", ".join(f"{name} was {before.get(name)!r}, is {identity[name]!r}" for name in other)
            raise EvalError(f"{folder} has answers of another run: {differences}; name another --output, or --restart")
    else:
        write_json(settings, identity, indent=2)
    parts.mkdir(exist_ok=True)
    for path in parts.iterdir():  # a process that was killed may have left half a line
        os.truncate(path, path.read_bytes().rfind(b"\n") + 1)


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


def _read_parts(folder: Path) -> dict[tuple[int | str, str], dict[str, Any]]:
    """The records in the files of a folder by id and prompt of their questions."""
    entries = (entry for path in sorted(folder.iterdir()) for _, entry in read_json_lines(path, _ANSWER))
    return {(entry["question_id"], entry["prompt"]): entry for entry in entries}


def _add(records: Sequence[Mapping[str, Any]], file: Any) -> None:
    """Adds records to an open file; they are on the disk when it returns."""
    file.write("".join(json.dumps(entry) + "\n" for entry in records))
    file.flush()
    os.fsync(file.fileno())


def record(question: Question, text: str, model_id: str) -> dict[str, Any]:
    """The line of an answers file in LLaVA-1.5's format."""
    fields = dict(question.fields)
    start = {"question_id": question.id, "prompt": question.prompt, "text": text}
    if "round_id" in fields:  # the one benchmark with more fields has this one second
        start = {"question_id": question.id, "round_id": fields.pop("round_id"), **start}
    end = {"answer_id": secrets.token_urlsafe(16), "model_id": model_id, "metadata": {}}
    return start | fields | end


def score_answers(
    benchmark: Benchmark, args: argparse.Namespace, answers_file: Path
) -> tuple[Score | None, Path | None]:
    """Scores an answers file, and writes what is to be sent in or handed to official scripts.

    With `--partial`, lines that are no JSON are skipped, and missing answers are treated by the benchmark's own rule.
    With `--limit`, questions beyond it may be missing.
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


def read_answers(path: Path, *, skip_broken: bool = False) -> tuple[list[Answer], int]:
    """The answers of a file in LLaVA-1.5's format, and how many lines were skipped because they are no JSON."""
    broken: list[int] | None = [] if skip_broken else None
    entries = [entry for _, entry in read_json_lines(path, _ANSWER, broken=broken)]
    return [Answer(entry["question_id"], entry["prompt"], entry["text"]) for entry in entries], len(broken or [])


def check_complete(questions: Sequence[Question], answers: Sequence[Answer], where: str) -> None:
    """Refuses answers that leave questions out, answer one twice, or answer others."""
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
