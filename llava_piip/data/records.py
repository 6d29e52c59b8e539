"""Reading LLaVA's conversation files."""

from __future__ import annotations

import json
import logging
import os
import re
from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any, Literal

from tqdm import tqdm

from .problems import DataError, reading

__all__ = ["Record", "Records", "parse_entry", "read_entries", "read_records"]

_log = logging.getLogger(__name__)

_NAMED = 3  # malformed entries that the log names
Paths = str | os.PathLike[str] | Sequence[str | os.PathLike[str]]

_EXAMPLE = '{"id": "1", "image": "a.jpg", "conversations": [{"from": "human", "value": "<image>\\nHi"}, ...]}'
_WHITESPACE = re.compile(r"[ \t\r\n]*")


@dataclass(frozen=True)
class Record:
    """One entry of a conversation file, as it is written there.

    Attributes:
        id: The entry's id; its index where it has none.
        images: Names of image files relative to the image folder, empty for text only.
        conversations: Turns {"from": ..., "value": ...}; who may speak when is checked by `messages_from_llava`.
        source: The file.
        index: Index of the entry in the file.
    """

    id: str
    images: tuple[str, ...]
    conversations: tuple[Mapping[str, str], ...]
    source: str
    index: int

    @property
    def where(self) -> str:
        """File, entry and id, for messages."""
        return f"{self.source}: entry {self.index} (id {self.id!r})"


class Records(Sequence[Record]):
    """The entries of one or several files, in order.

    Kept as the files' own text in one block and parsed when asked for: a million entries need little more than the
    size of their files, and forked workers share the block (lists of objects are copied, page by page, as soon as a
    worker looks at them). `read_records` makes it.

    Attributes:
        malformed: How many entries were left out.
    """

    def __init__(self, sources: Sequence[str]) -> None:
        self.malformed = 0
        self._sources = sources
        self._block, self._ends = bytearray(), array("Q", [0])
        self._indices, self._source_of = array("I"), array("H")

    def add(self, source: int, index: int, text: str) -> None:
        """Adds an entry: the number of its source, its index there, and its text."""
        self._block += text.encode()
        self._ends.append(len(self._block))
        self._indices.append(index)
        self._source_of.append(source)

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, index: int) -> Record:
        index = range(len(self))[index]  # negative ones, and IndexError
        entry = json.loads(self._block[self._ends[index] : self._ends[index + 1]])
        return parse_entry(entry, self._sources[self._source_of[index]], self._indices[index])


def read_records(paths: Paths, *, on_error: Literal["raise", "skip"] = "raise") -> Records:
    """Reads conversation files: a list in .json, or one entry per line in .jsonl.

    Args:
        paths: One file or several; a mixture is the files one after the other.
        on_error: "skip" leaves malformed entries out, counts them and names the first ones in the log.

    Raises:
        DataError: If a file is missing, is not what its name says or has no entries; if an entry is malformed and not
            to be skipped, or all are; with file, entry and fix.
    """
    files = [paths] if isinstance(paths, (str, os.PathLike)) else list(paths)
    if not files:
        raise DataError("no conversation file was given: name at least one .json or .jsonl file")
    errors: list[DataError] = []
    records = Records([str(Path(file)) for file in files])
    for number, file in enumerate(files):
        for index, (entry, text) in enumerate(read_entries(file)):
            try:
                parse_entry(entry, str(Path(file)), index)
            except DataError as error:
                if on_error == "raise":
                    raise
                errors.append(error)
                if len(errors) <= _NAMED:
                    _log.warning("Entry left out: %s", error)
            else:
                records.add(number, index, text)
    records.malformed = len(errors)
    if errors and not records:
        raise DataError(f"{errors[0]}; none of {len(errors)} entries can be used")
    if errors:
        _log.warning("%d malformed entries left out, %d entries are used", len(errors), len(records))
    return records


def read_entries(path: str | os.PathLike[str]) -> Iterator[tuple[Any, str]]:
    """What a conversation file lists, whatever it is, each with its text; for `parse_entry`.

    Raises:
        DataError: If the file is missing, is not what its name says, or has no entries.
    """
    path = Path(path)
    readers = {".json": _entries_of_list, ".jsonl": _entries_of_lines}
    if path.suffix.lower() not in readers:
        raise DataError(f"{path}: expected a file named .json (a list of entries) or .jsonl (an entry per line)")
    empty = True
    with (
        reading(path, DataError, "give the path of a conversation file"),
        tqdm(total=path.stat().st_size, desc=path.name, unit="B", unit_scale=True, delay=3, leave=False) as bar,
    ):
        for entry, text in readers[path.suffix.lower()](path):
            empty = False
            bar.update(len(text))
            yield entry, text
    if empty:
        raise DataError(f"{path}: has no entries; expected some like {_EXAMPLE}")


def parse_entry(entry: Any, source: str, index: int) -> Record:
    """Makes a record of a JSON value that a file lists.

    Raises:
        DataError: If it is no record; names file, entry, what was expected and the fix.
    """
    where = f"{source}: entry {index}"
    if not isinstance(entry, dict):
        raise DataError(f"{where} is {_short(entry)}, expected an object like {_EXAMPLE}")
    name = entry.get("id", index)
    if not isinstance(name, (str, int)) or isinstance(name, bool):
        raise DataError(f"{where}: 'id' is {_short(name)}, expected a text or a number")
    where = f"{where} (id {str(name)!r})"
    turns = entry.get("conversations")
    if not isinstance(turns, list) or not turns:
        found = _short(turns) if "conversations" in entry else f"missing (fields: {', '.join(map(str, entry))})"
        raise DataError(f"{where}: 'conversations' is {found}, expected a list of turns as in {_EXAMPLE}")
    for number, turn in enumerate(turns):
        if not isinstance(turn, dict) or not all(isinstance(turn.get(key), str) for key in ("from", "value")):
            raise DataError(
                f"{where}: turn {number} is {_short(turn)}, expected an object with the texts 'from' and 'value'"
            )
        try:
            turn["value"].encode()
        except UnicodeEncodeError as error:  # JSON can write it (\\ud83d), and no tokenizer takes it
            raise DataError(
                f"{where}: turn {number} has half of a character (a lone surrogate) at position {error.start} of its "
                "text; remove it"
            ) from None
    return Record(str(name), _images(entry, where), tuple(turns), source, index)


def _entries_of_list(path: Path) -> Iterator[tuple[Any, str]]:
    """Entries and their text; one at a time, because the whole list as objects takes many times the file's size."""
    text = path.read_text(encoding="utf-8-sig")
    decoder = json.JSONDecoder()
    position = _skip(text, 0)
    if position == len(text):
        return
    if text[position] != "[":
        raise DataError(
            f"{path}: starts with {text[position : position + 20]!r}, expected a list '[' of entries; "
            "a file with one entry per line must be named .jsonl"
        )
    position = _skip(text, position + 1)
    if text[position : position + 1] == "]":
        return
    for index in count():
        try:
            entry, end = decoder.raw_decode(text, position)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{path}: entry {index}: {_json_fault(error, text)}") from None
        yield entry, text[position:end]
        position = _skip(text, end)
        if text[position : position + 1] == "]":
            break
        if text[position : position + 1] != ",":
            found = f"{text[position : position + 20]!r} follows" if position < len(text) else "the file ends"
            raise DataError(
                f"{path}: {found} after entry {index}, expected ',' or ']'; an incomplete file must be loaded again"
            )
        position = _skip(text, position + 1)
    if (position := _skip(text, position + 1)) < len(text):
        raise DataError(f"{path}: {text[position : position + 20]!r} follows the list, expected its end; remove it")


def _entries_of_lines(path: Path) -> Iterator[tuple[Any, str]]:
    with path.open(encoding="utf-8-sig") as file:
        lines = ((number, line) for number, line in enumerate(file, 1) if line.strip())
        for index, (number, line) in enumerate(lines):
            try:
                yield json.loads(line), line.strip()
            except (ValueError, RecursionError) as error:
                raise DataError(
                    f"{path}: entry {index} (line {number}): {_json_fault(error, line)}; "
                    "a list over several lines must be named .json"
                ) from None


def _skip(text: str, position: int) -> int:
    """Where the white space ends that starts at a position."""
    return _WHITESPACE.match(text, position).end()


def _json_fault(error: ValueError | RecursionError, text: str) -> str:
    if not isinstance(error, json.JSONDecodeError):  # thousands of digits or brackets
        return f"{error}; correct the file"
    if error.pos >= len(text.rstrip()):
        return f"the text ends inside of it ({error.msg}); an incomplete file must be loaded again"
    return f"{error.msg} at line {error.lineno}, column {error.colno}; correct the file"


def _images(entry: Mapping[str, Any], where: str) -> tuple[str, ...]:
    for other in ("images", "video", "videos"):
        if entry.get(other) and "image" not in entry:
            raise DataError(f"{where}: has {other!r}, which would be ignored; expected the file names in 'image'")
    given = entry.get("image")
    names = [] if given is None else given if isinstance(given, list) else [given]
    if not all(isinstance(name, str) and name for name in names):
        raise DataError(
            f"{where}: 'image' is {_short(given)}, expected a file name or a list of them; "
            "leave the field out where there is no image"
        )
    return tuple(names)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
