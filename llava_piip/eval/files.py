"""Reading what benchmarks come in, with errors that name the file, the line and the fix."""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from piip_core.errors import UserError
from piip_core.files import write_atomically

from ..data.problems import reading

__all__ = ["EvalError", "checked", "read_json", "read_json_lines", "read_table", "write_json"]

_SOURCES = "docs/evaluation.md says where each file comes from"


class EvalError(UserError):
    """Questions, labels or answers of a benchmark cannot be used; the message names the file, the entry and the fix."""


def checked(value: Any, form: Any, where: str) -> Any:
    """A JSON value, if it has a form: a type, several types, `[form of each]`, or `{"name": form, ...}` and more.

    Raises:
        EvalError: If it has not; says where.
    """
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
    """The content of a JSON file.

    Raises:
        EvalError: If it is missing, is no JSON or has not the form that `checked` takes.
    """
    with reading(path, EvalError, _SOURCES):
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
    path: Path, form: Any = dict, *, broken: list[int] | None = None, only_ended: bool = False
) -> Iterator[tuple[str, dict[str, Any]]]:
    """The objects of a file with one per line, of a form that `checked` takes, and for messages where they are.

    Args:
        path: The file, whatever its name ends in.
        form: Of each object.
        broken: Takes the numbers of lines that are no JSON object; without it they are an error, except for empty ones.
        only_ended: Leave out a last line without a line break, which somebody may still be writing.
    """
    with reading(path, EvalError, _SOURCES), path.open(encoding="utf-8-sig") as file:
        for number, line in enumerate(file, 1):
            if (broken is None and not line.strip()) or (only_ended and not line.endswith("\n")):
                continue
            try:
                value = json.loads(line)
            except json.JSONDecodeError as error:
                value = error
            if isinstance(value, dict):
                yield f"{path}: line {number}", checked(value, form, f"{path}: line {number}")
            elif broken is None:
                why = f"no JSON ({value})" if isinstance(value, json.JSONDecodeError) else "no object"
                raise EvalError(f"{path}: line {number} is {why}: {line.strip()[:80]!r}; remove or repair it")
            else:
                broken.append(number)


def read_table(path: Path) -> Iterator[tuple[int, dict[str, str]]]:
    """The rows of a table with tabs between its cells and a header, and the lines they end at.

    Raises:
        EvalError: If the file is missing, has no header, or a row has more or fewer cells than that.
    """
    previous = csv.field_size_limit(min(sys.maxsize, 2**31 - 1))  # cells hold images
    try:
        with reading(path, EvalError, _SOURCES), path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file, delimiter="\t")
            if not reader.fieldnames:
                raise EvalError(f"{path}: empty; expected a header line")
            for row in reader:
                if None in row or None in row.values():
                    raise EvalError(
                        f"{path}: the row that ends at line {reader.line_num} has not {len(reader.fieldnames)} cells "
                        "like the header; load the file again"
                    )
                yield reader.line_num, row
    except csv.Error as error:
        raise EvalError(f"{path}: no table with tabs ({error}); load it again") from None
    finally:
        csv.field_size_limit(previous)
