"""Writing files and folders so that a crash never leaves half of one."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from .errors import UserError

__all__ = ["atomic_path", "flush", "publish_folder", "rename_durably", "write_atomically"]


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
        flush(aside)
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


@contextmanager
def publish_folder(path: str | os.PathLike[str], *, overwrite: bool = False, durable: bool = True) -> Iterator[Path]:
    """Gives a new folder beside `path` to write into, and renames it to `path` when the block ends without an error.

    Args:
        path: Folder to make.
        overwrite: Replace a folder that exists and is not empty; its content goes only once the new one is complete.
        durable: Wait until every file is on the disk, so that a power failure leaves no empty ones. False for thousands
            of small files that can be made again: each takes milliseconds.

    Raises:
        UserError: If the folder exists, is not empty and may not be replaced, or if `path` is a file.
    """
    path = Path(path)
    if path.exists() and not path.is_dir():
        raise UserError(f"{path}: is a file; expected the name of a folder to write")
    if path.is_dir() and any(path.iterdir()) and not overwrite:
        raise UserError(f"{path}: the folder is not empty; name another one, or allow it to be replaced (overwrite)")
    aside, old = (path.with_name(f".{path.name}.{state}") for state in ("incomplete", "replaced"))
    for leftover in (aside, old):
        shutil.rmtree(leftover, ignore_errors=True)
    aside.mkdir(parents=True)
    try:
        yield aside
        if durable:
            flush(aside)
        if path.is_dir():
            os.replace(path, old)
        rename_durably(aside, path)
    except BaseException:
        if old.is_dir() and not path.exists():
            os.replace(old, path)
        shutil.rmtree(aside, ignore_errors=True)
        raise
    shutil.rmtree(old, ignore_errors=True)


def flush(path: Path) -> None:
    """Waits until a file, or a folder with all below it, is on the disk: a rename may get there before its content."""
    for entry in (*path.rglob("*"), path):
        _sync(entry)


def rename_durably(source: Path, target: Path) -> None:
    """Renames a file or folder, and waits until the new name is on the disk."""
    os.replace(source, target)
    _sync(target.parent)


def _sync(path: Path) -> None:
    """Waits until a file, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
