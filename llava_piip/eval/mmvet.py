"""MM-Vet: open questions that a language model grades elsewhere."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from .benchmark import Answer, Benchmark, read_llava_questions
from .files import write_json

__all__ = ["MM_VET"]


def _export(questions_file: Path, target: Path, answers: Sequence[Answer]) -> None:
    write_json(target, {f"v1_{answer.id}": answer.text for answer in answers}, indent=2)


MM_VET = Benchmark(
    name="mmvet",
    title="MM-Vet",
    score_field="mm_vet",
    folder="mm-vet",
    questions="llava-mm-vet.jsonl",
    images="images",
    read=read_llava_questions,
    published=218,
    max_new_tokens=1024,
    export=("mmvet_upload.json", _export),
    remote="MM-Vet's grader (GPT-4)",
)
