"""What a benchmark is: where its files lie, how it asks, how answers are scored and sent in."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .files import EvalError, read_json_lines

__all__ = ["LETTER", "Answer", "Benchmark", "Question", "Score", "last_answers", "percent", "read_llava_questions"]

LETTER = "\nAnswer with the option's letter from the given choices directly."
_QUESTION = {"question_id": (int, str), "text": str, "image": str}


@dataclass(frozen=True)
class Question:
    """One question of a benchmark."""

    id: int | str  # of TextVQA several questions have the same
    text: str  # what is asked, after the image
    image: str | bytes | None = None  # a name below the benchmark's image folder, or the content of a file
    recorded: str | None = None  # the question as answers files have it, where that is not `text`
    category: str = ""  # group that scores are told by
    fields: Mapping[str, Any] = field(default_factory=dict)  # more fields of the record in answers files

    @property
    def prompt(self) -> str:
        """The question as answers files have it."""
        return self.text if self.recorded is None else self.recorded


@dataclass(frozen=True)
class Answer:
    """A line of an answers file: id and text of the question, the answer, and the other fields."""

    id: int | str
    prompt: str
    text: str
    fields: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Score:
    """How answers were scored: the published number, all numbers as text to print, and for programs."""

    value: float | None  # in percent; None where there is nothing to divide by
    lines: Sequence[str]
    details: Mapping[str, Any]


@dataclass(frozen=True)
class Benchmark:
    """A row of the table of benchmarks."""

    name: str  # on the command line
    title: str  # in the literature
    score_field: str | None  # of `piip_core.zoo.MultimodalScores`, that the score compares with
    folder: str  # below that of all benchmarks, as in LLaVA-1.5's evaluation archive
    questions: str  # the question file in it
    images: str | None  # the folder of images in it; None where the question file holds them
    read: Callable[[Path], list[Question]]  # of the question file, as are the next two
    score: Callable[[Path, Sequence[Answer]], Score] | None = None  # None where that happens elsewhere
    # The name of a file to send in or to hand to the official script, and what writes the answers to a path
    export: tuple[str, Callable[[Path, Path, Sequence[Answer]], None]] | None = None
    labels: tuple[str, ...] = ()  # files beside the question file that scoring or exporting needs
    published: int | None = None  # number of questions of the published question file
    max_new_tokens: int = 128
    convert_before_padding: bool = True  # of images, in the published results
    needs: tuple[str, ...] = ()  # packages that the export needs beside those of the model
    remote: str = ""  # where answers are scored instead, or too

    def question_file(self, data: Path) -> Path:
        """The question file below the folder of all benchmarks."""
        return data / self.folder / self.questions

    def image_folder(self, data: Path) -> Path | None:
        """The image folder below the folder of all benchmarks."""
        return None if self.images is None else data / self.folder / self.images


def read_llava_questions(path: Path) -> list[Question]:
    """Questions of a file with an object per line: question_id, image, text, category.

    Raises:
        EvalError: If the file or a line cannot be used.
    """
    questions = [
        Question(entry["question_id"], entry["text"], entry["image"], category=str(entry.get("category", "")))
        for _, entry in read_json_lines(path, _QUESTION)
    ]
    if not questions:
        raise EvalError(f"{path}: has no questions; load it again")
    return questions


def last_answers(answers: Sequence[Answer]) -> dict[int | str, Answer]:
    """Answers by question; of several to the same question the last one counts, as in the public scripts."""
    return {answer.id: answer for answer in answers}


def percent(right: float, count: int) -> float | None:
    """A share in percent; None of nothing."""
    return 100.0 * right / count if count else None
