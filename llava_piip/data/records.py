"""Reading LLaVA's conversation files, and the errors of training data."""

from __future__ import annotations

import json
import logging
import os
from array import array
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any, Literal

from piip_core.errors import UserError

from ..conversation import IMAGE_TAG, ConversationError, messages_from_llava

_log = logging.getLogger(__name__)

AnyPath = str | os.PathLike[str]

_NAMED = 3  # malformed entries that the log names
_EXAMPLE = '{"id": "1", "image": "a.jpg", "conversations": [{"from": "human", "value": "<image>\\nHi"}, ...]}'


class Problem(Enum):
    """Kinds of unusable samples; the value is the name in reports."""

    MISSING = "image missing"
    OUTSIDE = "image outside of its folder"
    EMPTY = "image file empty"
    UNREADABLE = "image file unreadable"
    BROKEN = "image broken"
    TOO_LARGE = "image too large"
    UNUSABLE = "image of an unusable kind"
    PLACEHOLDERS = "placeholders do not match the images"
    CONVERSATION = "conversation unusable"
    RECORD = "entry malformed"


class DataError(UserError):
    """Training data that cannot be used; the message names the file, the entry and the fix.

    Attributes:
        problem: The kind, by which skipped samples are counted.
    """

    def __init__(self, message: str, problem: Problem = Problem.RECORD) -> None:
        super().__init__(message)  # the message alone: DataLoader builds the error anew from it in the main process
        self.problem = problem


@contextmanager
def reading(path: Path, error_type: type[UserError], advice: str) -> Iterator[None]:
    """Turns what makes a text file unreadable into an error that names it."""
    try:
        yield
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else f"not UTF-8 text: {error}"
        raise error_type(f"{path}: cannot be read ({reason}); {advice}") from error


@dataclass(frozen=True)
class Record:
    """One entry of a conversation file, as it is written there.

    Attributes:
        id: The entry's id; its index where it has none.
        images: Names of image files relative to the image folder, empty for text only.
        conversations: Turns {"from": ..., "value": ...}; `messages` checks who may speak when.
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

    def messages(self) -> list[dict[str, str]]:
        """The conversation as messages, by LLaVA's rule for the placeholder if there is one image.

        Raises:
            DataError: If turns are out of order, or there is not one placeholder for each image.
        """
        try:
            messages = messages_from_llava(self.conversations, has_image=len(self.images) == 1)
        except ConversationError as error:
            raise DataError(f"{self.where}: {error}", Problem.CONVERSATION) from error
        texts = [message["content"] for message in messages]
        found = sum(text.count(IMAGE_TAG) if self.images else is_placeholder(text) for text in texts)
        if found != len(self.images):
            raise DataError(
                f"{self.where}: {found} placeholders {IMAGE_TAG} in the text and {len(self.images)} images in the "
                "field 'image', expected one placeholder for each image; correct the entry",
                Problem.PLACEHOLDERS,
            )
        return messages


def is_placeholder(text: str) -> bool:
    """Whether a message of an entry without images looks as if an image belongs to it: a line of the tag at an end."""
    return text == IMAGE_TAG or text.startswith(IMAGE_TAG + "\n") or text.endswith("\n" + IMAGE_TAG)


class Records(Sequence[Record]):
    """The entries of one or several files, in order; `read_records` makes it.

    Kept as text in one block, which forked workers share: lists of objects are copied, page by page, as soon as a
    worker looks at them.

    Attributes:
        malformed: How many entries were left out.
    """

    def __init__(self, sources: Sequence[str]) -> None:
        self.malformed = 0
        self._sources = sources
        self._block, self._ends = bytearray(), array("Q", [0])

    def add(self, record: Record) -> None:
        """Adds an entry of one of the sources."""
        source = self._sources.index(record.source)
        self._block += json.dumps([record.id, record.images, record.conversations, source, record.index]).encode()
        self._ends.append(len(self._block))

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, index: int) -> Record:
        index = range(len(self))[index]  # negative ones, and IndexError
        text = self._block[self._ends[index] : self._ends[index + 1]]
        name, images, conversations, source, number = json.loads(text)
        return Record(name, tuple(images), tuple(conversations), self._sources[source], number)


def read_records(paths: AnyPath | Sequence[AnyPath], *, on_error: Literal["raise", "skip"] = "raise") -> Records:
    """Reads conversation files: a list in .json, or one entry per line in .jsonl.

    Args:
        paths: One file or several; a mixture is the files one after the other.
        on_error: "skip" leaves malformed entries out, counts them and names the first ones in the log.

    Raises:
        DataError: If a file is missing, is not what its name says or has no entries; if an entry is malformed and not
            to be skipped, or all are; with file, entry and fix.
    """
    files = [str(Path(path)) for path in ([paths] if isinstance(paths, (str, os.PathLike)) else paths)]
    if not files:
        raise DataError("no conversation file was given: name at least one .json or .jsonl file")
    errors: list[DataError] = []
    records = Records(files)
    for file in files:
        for index, entry in enumerate(read_entries(file)):
            try:
                records.add(parse_entry(entry, file, index))
            except DataError as error:
                if on_error == "raise":
                    raise
                errors.append(error)
                if len(errors) <= _NAMED:
                    _log.warning("Entry left out: %s", error)
    records.malformed = len(errors)
    if errors and not records:
        raise DataError(f"{errors[0]}; none of {len(errors)} entries can be used")
    if errors:
        _log.warning("%d malformed entries left out, %d entries are used", len(errors), len(records))
    return records


def read_entries(path: AnyPath) -> Iterator[Any]:
    """What a conversation file lists, whatever it is; for `parse_entry`."""
    path = Path(path)
    if path.suffix.lower() not in (".json", ".jsonl"):
        raise DataError(f"{path}: expected a file named .json (a list of entries) or .jsonl (an entry per line)")
    with reading(path, DataError, "give the path of a conversation file"), path.open(encoding="utf-8-sig") as file:
        if path.suffix.lower() == ".json":
            entries = _parse_json(file.read(), str(path))
            if not isinstance(entries, list):
                raise DataError(f"{path}: starts with no list '[' of entries; one entry per line must be named .jsonl")
        else:
            lines = ((number, line) for number, line in enumerate(file, 1) if line.strip())
            entries = (_parse_json(line, f"{path}: line {number}") for number, line in lines)
        empty = True
        for entry in entries:
            empty = False
            yield entry
    if empty:
        raise DataError(f"{path}: has no entries; expected some like {_EXAMPLE}")


def parse_entry(entry: Any, source: str, index: int) -> Record:
    """Makes a record of a JSON value that a file lists."""
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
    turns = tuple({"from": turn["from"], "value": turn["value"]} for turn in turns)
    return Record(str(name), _images(entry, where), turns, source, index)


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


def _parse_json(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:  # of thousands of digits or brackets
        raise DataError(
            f"{where}: no JSON ({error}); load an incomplete file again. A list of entries must be named .json, an "
            "entry per line .jsonl"
        ) from None


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
