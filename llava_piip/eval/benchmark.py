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
    """One question of a benchmark.

    Attributes:
        id: Its id in the question file; of TextVQA several questions have the same.
        text: What is asked, after the image.
        image: Name of the image below the benchmark's image folder, the bytes of an image file, or None.
        recorded: The question as answers files have it, where that is not `text`.
        category: Group that scores are told by.
        fields: More fields of the record in answers files.
    """

    id: int | str
    text: str
    image: str | bytes | None = None
    recorded: str | None = None
    category: str = ""
    fields: Mapping[str, Any] = field(default_factory=dict)

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
    """How answers were scored.

    Attributes:
        value: The published kind of number, in percent; None where there is nothing to divide by.
        lines: The numbers as text to print.
        details: The numbers for programs.
    """

    value: float | None
    lines: Sequence[str]
    details: Mapping[str, Any]


@dataclass(frozen=True)
class Benchmark:
    """A row of the table of benchmarks.

    Attributes:
        name: Name on the command line.
        title: Name in the literature.
        score_field: Field of `piip_core.zoo.MultimodalScores` that the score compares with; None for none.
        folder: Its folder below that of all benchmarks, as in LLaVA-1.5's evaluation archive.
        questions: Question file, relative to the folder.
        images: Folder of the images, relative to the folder; None where the question file holds them.
        read: Reads questions from the question file.
        labels: Files beside the question file that scoring or exporting needs.
        published: Number of questions of the published question file, where known.
        max_new_tokens: Longest answer.
        convert_before_padding: Setting of the image processor that the published results were made with.
        score: Scores answers; None where that happens elsewhere. Both get the question file.
        export: Name of a file to send in or to hand to the official script, and what writes it from the question file,
            the path to write and the answers.
        needs: Packages that the export needs beside those of the model.
        remote: Where answers are scored instead, or too.
    """

    name: str
    title: str
    score_field: str | None
    folder: str
    questions: str
    images: str | None
    read: Callable[[Path], list[Question]]
    labels: tuple[str, ...] = ()
    published: int | None = None
    max_new_tokens: int = 128
    convert_before_padding: bool = True
    score: Callable[[Path, Sequence[Answer]], Score] | None = None
    export: tuple[str, Callable[[Path, Path, Sequence[Answer]], None]] | None = None
    needs: tuple[str, ...] = ()
    remote: str = ""

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
