"""VQAv2: open questions, test-dev; a server scores."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from .benchmark import Answer, Benchmark, last_answers, read_llava_questions
from .files import write_json
from .vqa_text import normalized

__all__ = ["VQAV2"]

# The server wants an entry for every question of the whole test split, of which test-dev is a part
_ALL_QUESTIONS = "llava_vqav2_mscoco_test2015.jsonl"


def _export(questions_file: Path, target: Path, answers: Sequence[Answer]) -> None:
    known = last_answers(answers)
    entries = []
    for question in read_llava_questions(questions_file.parent / _ALL_QUESTIONS):
        answer = known.get(question.id)
        entries.append({"question_id": question.id, "answer": "" if answer is None else normalized(answer.text)})
    write_json(target, entries)


VQAV2 = Benchmark(
    name="vqav2",
    title="VQAv2",
    score_field="vqav2",
    folder="vqav2",
    questions="llava_vqav2_mscoco_test-dev2015.jsonl",
    images="test2015",
    read=read_llava_questions,
    labels=(_ALL_QUESTIONS,),
    published=107_394,
    export=("vqav2_upload.json", _export),
    remote="the VQA challenge's server on EvalAI (test-dev)",
)
