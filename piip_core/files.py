"""Writing files so that a crash never leaves half of one."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

__all__ = ["atomic_path", "write_atomically"]


@contextmanager
def atomic_path(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Gives a path beside `path` to write to, and moves that file to `path` when the block ends without an error.

    Whatever interrupts the writing, `path` holds its old content or all of the new one.
    """
    path = Path(path)
    # A fixed name: what a killed process left behind is overwritten by the next attempt
    aside = path.with_name(f".{path.name}.incomplete")
    try:
        yield aside
        with open(aside, "rb+") as file:
            os.fsync(file.fileno())
        aside.chmod(0o666 & ~_umask())  # some libraries make private files
        os.replace(aside, path)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise


@contextmanager
def write_atomically(path: str | os.PathLike[str], mode: str = "wb") -> Iterator[IO[Any]]:
    """Opens a file that takes the place of `path` when the block ends without an error; see `atomic_path`.

    Args:
        path: File to write.
        mode: As for `open`.
    """
    with atomic_path(path) as aside, open(aside, mode) as file:
        yield file


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
