"""Annotation files in LLaVA's format from tables of captions or questions."""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from tqdm import tqdm

from piip_core.errors import UserError
from piip_core.files import write_atomically

from ..conversation import IMAGE_TAG
from .images import ImageFolder
from .problems import DataError, reading

__all__ = ["DEFAULT_PROMPT", "TableError", "records_from_table", "write_entries"]

DEFAULT_PROMPT = "Describe this image."
_LISTED = 10


class TableError(UserError):
    """A table of images and texts cannot be used; the message names file, row and fix."""


def records_from_table(
    table: str | os.PathLike[str],
    image_root: str | os.PathLike[str],
    *,
    prompt: str = DEFAULT_PROMPT,
    follow_links: bool = False,
) -> list[dict[str, Any]]:
    """Makes LLaVA records of a table, `.csv` with a header line or `.jsonl` with an object per line: one per row.

    Columns: `file` (image, relative to `image_root`), and either `caption`, to which `prompt` is the question, or
    `question` and `answer`; optionally `id`.

    Raises:
        TableError: If the table or a row cannot be used, or an image is missing or broken; the message lists the first
            rows and counts the others.
        ConfigError: If there is no folder of images.
    """
    table, images = Path(table), ImageFolder(image_root, follow_links=follow_links)
    if IMAGE_TAG in prompt:
        raise TableError(f"prompt {prompt!r}: {IMAGE_TAG} is put in front of it anyway; leave it out")
    records, problems = [], []
    rows = tqdm(_rows(table), desc=f"Reading {table.name}", unit="row", disable=None)
    for index, (line, row) in enumerate(rows):
        try:
            records.append(_record(row, index, images, prompt))
        except (TableError, DataError) as error:
            problems.append(f"line {line}: {error}")
    if problems:
        more = f"\n  and {len(problems) - _LISTED} more" if len(problems) > _LISTED else ""
        listed = "\n  ".join(problems[:_LISTED])
        raise TableError(
            f"{table}: {len(problems)} of {len(problems) + len(records)} rows cannot be used:\n  {listed}{more}"
        )
    if not records:
        raise TableError(f"{table}: no rows; expected at least one image with a text")
    return records


def write_entries(path: str | os.PathLike[str], texts: Iterable[str]) -> int:
    """Writes entries, given as JSON, to a conversation file, one per line, and returns their number.

    A list for `.json`, the entries alone for `.jsonl`; an interruption leaves the old file.

    Raises:
        TableError: If the name ends in something else.
    """
    path, count = Path(path), 0
    if path.suffix.lower() not in (".json", ".jsonl"):
        raise TableError(f"{path}: expected a name that ends in .json or .jsonl")
    start, separator, end = ("[\n", ",\n", "\n]\n") if path.suffix.lower() == ".json" else ("", "\n", "\n")
    path.parent.mkdir(parents=True, exist_ok=True)
    with write_atomically(path) as file:
        file.write(start.encode())
        for count, text in enumerate(texts, start=1):
            line = text if "\n" not in text else json.dumps(json.loads(text))
            file.write((separator if count > 1 else "").encode() + line.encode())
        file.write(end.encode())
    return count


def _rows(table: Path) -> Iterator[tuple[int, Mapping[str, Any] | str]]:
    """Yields the line of a row, and its cells, or JSON."""
    suffix = table.suffix.lower()
    if suffix not in (".csv", ".jsonl"):
        raise TableError(f"{table}: expected a name that ends in .csv or .jsonl")
    # Spreadsheet programs put a byte order mark in front
    with reading(table, TableError), open(table, encoding="utf-8-sig", newline="") as file:
        try:
            if suffix == ".jsonl":
                yield from ((number, line) for number, line in enumerate(file, 1) if line.strip())
                return
            reader = csv.DictReader(file, strict=True)
            columns = reader.fieldnames or []
            if "file" not in columns or not ("caption" in columns or {"question", "answer"} <= set(columns)):
                found = ", ".join(columns) or "none"
                raise TableError(f"{table}: columns {found}: expected file, and caption or question and answer")
            yield from ((reader.line_num, row) for row in reader)
        except csv.Error as error:
            raise TableError(f"{table}: line {reader.reader.line_num}: {error}") from error


def _record(row: Mapping[str, Any] | str, index: int, images: ImageFolder, prompt: str) -> dict[str, Any]:
    """A LLaVA record of a row, or an error that says what it lacks."""
    if isinstance(row, str):
        try:
            row = json.loads(row)
        except json.JSONDecodeError as error:
            raise TableError(f"not JSON ({error})") from error
        if not isinstance(row, dict):
            raise TableError(f"{type(row).__name__}; expected an object")
    if None in row:  # csv.DictReader's key for cells without a column
        raise TableError("more cells than columns: put texts with commas in quotes")
    name = _text(row, "file")
    if row.get("caption"):
        if row.get("question") or row.get("answer"):
            raise TableError("has a caption and a question or answer: expected either")
        question, answer = prompt, _text(row, "caption")
    else:
        question, answer = _text(row, "question"), _text(row, "answer")
    if IMAGE_TAG in question or IMAGE_TAG in answer:
        raise TableError(f"{IMAGE_TAG} in the text: it stands for an image, of which a row has one; leave it out")
    images.open(name)
    return {
        "id": str(row.get("id") or index),
        "image": name,
        "conversations": [
            {"from": "human", "value": f"{IMAGE_TAG}\n{question}"},
            {"from": "gpt", "value": answer},
        ],
    }


def _text(row: Mapping[str, Any], column: str) -> str:
    value = row.get(column)
    if not isinstance(value, str) or not value.strip():
        raise TableError(f"{column} is {value!r}: expected a text")
    return value.strip()
