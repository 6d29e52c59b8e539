"""What a benchmark is: where its files lie, how it asks, how answers are scored and sent in; and reading its files."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from piip_core.errors import UserError
from piip_core.files import write_atomically

from ..data.records import reading

LETTER = "\nAnswer with the option's letter from the given choices directly."
_QUESTION = {"question_id": (int, str), "text": str, "image": str}
SOURCES = "docs/evaluation.md says where each file comes from"


class EvalError(UserError):
    """Questions, labels or answers of a benchmark cannot be used; the message names the file, the entry and the fix."""


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
    """A line of an answers file: id and text of the question, and the answer."""

    id: int | str
    prompt: str
    text: str


@dataclass(frozen=True)
class Score:
    """How answers were scored: the published number, all numbers as text to print, and for programs."""

    value: float | None  # in percent; None where there is nothing to divide by
    lines: Sequence[str]
    details: Mapping[str, Any]


def read_llava_questions(path: Path) -> list[Question]:
    """Questions of a file with an object per line: question_id, image, text, category."""
    questions = [
        Question(entry["question_id"], entry["text"], entry["image"], category=str(entry.get("category", "")))
        for _, entry in read_json_lines(path, _QUESTION)
    ]
    if not questions:
        raise EvalError(f"{path}: has no questions; load it again")
    return questions


@dataclass(frozen=True, kw_only=True)
class Benchmark:
    """One of the benchmarks of the published table."""

    name: str  # on the command line
    title: str  # in the literature
    folder: str  # below that of all benchmarks, as in LLaVA-1.5's evaluation archive
    questions: str  # the question file in it
    images: str | None  # the folder of images in it; None where the question file holds them
    published: int  # number of questions of the published question file
    max_new_tokens: int = 128
    convert_before_padding: bool = True  # of images, in the published results
    labels: tuple[str, ...] = ()  # files beside the question file that scoring or exporting needs
    read: Callable[[Path], list[Question]] = read_llava_questions  # of the question file, as are the next two
    score: Callable[[Path, Sequence[Answer]], Score] | None = None  # None where that happens elsewhere
    # The name of a file to send in or to hand to the official script, and what writes the answers to a path
    export: tuple[str, Callable[[Path, Path, Sequence[Answer]], None]] | None = None
    needs: tuple[str, ...] = ()  # packages that the export needs beside those of the model
    remote: str = ""  # where answers are scored instead, or too

    def question_file(self, data: Path) -> Path:
        """The question file below the folder of all benchmarks."""
        return data / self.folder / self.questions

    def image_folder(self, data: Path) -> Path | None:
        """The image folder below the folder of all benchmarks."""
        return None if self.images is None else data / self.folder / self.images

    def missing_files(self, data: Path, *, with_images: bool = True) -> list[Path]:
        """Files and folders below the folder of all benchmarks that are needed and not there."""
        questions, images = self.question_file(data), self.image_folder(data)
        files = [questions, *(questions.parent / name for name in self.labels)]
        missing = [path for path in files if not path.is_file()]
        return missing + [images] if with_images and images is not None and not images.is_dir() else missing


def last_answers(answers: Sequence[Answer]) -> dict[int | str, Answer]:
    """Answers by question; of several to the same question the last one counts, as in the public scripts."""
    return {answer.id: answer for answer in answers}


def percent(right: float, count: int) -> float | None:
    """A share in percent; None of nothing."""
    return 100.0 * right / count if count else None


def checked(value: Any, form: Any, where: str) -> Any:
    """A JSON value, if it has a form: a type, several types, `[form of each]`, or `{"name": form, ...}` and more."""
    kinds = (type(form),) if isinstance(form, (list, dict)) else form if isinstance(form, tuple) else (form,)
    if not isinstance(value, kinds) or isinstance(value, bool):
        expected = " or ".join(kind.__name__ for kind in kinds)
        raise EvalError(f"{where} is {str(value)[:60]!r}, expected {expected}; load the file again")
    if isinstance(form, list):
        for number, item in enumerate(value):
            checked(item, form[0], f"{where}: item {number}")
    elif isinstance(form, dict):
        for name, inner in form.items():
            if name not in value:
                raise EvalError(f"{where}: {name!r} is missing (fields: {', '.join(value)})")
            checked(value[name], inner, f"{where}: {name!r}")
    return value


def read_json(path: Path, form: Any = object) -> Any:
    """The content of a JSON file."""
    with reading(path, EvalError, SOURCES):
        try:
            content = json.loads(path.read_text(encoding="utf-8-sig"))
        except json.JSONDecodeError as error:
            raise EvalError(f"{path}: no JSON ({error}); load it again") from None
    return checked(content, form, str(path))


def write_json(path: Path, content: Any, *, indent: int | None = None) -> None:
    """Writes a JSON file, or leaves the old one if something interrupts it."""
    with write_atomically(path, "w") as file:
        json.dump(content, file, indent=indent)


def read_json_lines(
    path: Path, form: Any = dict, *, broken: list[int] | None = None
) -> Iterator[tuple[str, dict[str, Any]]]:
    """The objects of a file with one per line, of a form that `checked` takes, and for messages where they are.

    Args:
        path: The file, whatever its name ends in.
        form: Of each object.
        broken: Takes the numbers of lines that are no JSON object; without it they are an error, except for empty ones.
    """
    with reading(path, EvalError, SOURCES), path.open(encoding="utf-8-sig") as file:
        for number, line in enumerate(file, 1):
            if broken is None and not line.strip():
                continue
            try:
                value = json.loads(line)
            except json.JSONDecodeError:
                value = None
            if isinstance(value, dict):
                yield f"{path}: line {number}", checked(value, form, f"{path}: line {number}")
            elif broken is None:
                raise EvalError(f"{path}: line {number} is no JSON object: {line.strip()[:80]!r}; remove or repair it")
            else:
                broken.append(number)
