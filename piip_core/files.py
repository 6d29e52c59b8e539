"""Files and folders: written so that a crash never leaves half of one, read only if they can be, one run in each."""

from __future__ import annotations

import errno
import glob
import json
import os
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from safetensors import SafetensorError

from .errors import OutputFolderError, SaveError, UserError

_FULL = "free some space, or name a place on another disk"
_FORBIDDEN = "name a place that you may write to"
_REMEDIES = {
    errno.ENOSPC: _FULL,
    errno.EDQUOT: _FULL,
    errno.EFBIG: "files of this size are not allowed there (ulimit -f, or the file system): name another place",
    errno.EACCES: _FORBIDDEN,
    errno.EPERM: _FORBIDDEN,
    errno.EROFS: _FORBIDDEN,
    errno.ENOTDIR: "a file is where a folder is expected: name another place",
    errno.EEXIST: "a file is where a folder is expected: name another place",
    errno.EISDIR: "a folder is where a file is expected: name another place",
    errno.EIO: "the disk fails: name a place on another one",
}
LOCK_NAME = ".lock"


def check_regular(path: Path, error: type[UserError] = UserError) -> None:
    """Refuses what is not there, and folders, pipes and devices, which cannot be read or never end."""
    if not path.is_file():
        what = "is a folder" if path.is_dir() else "is a pipe or device" if path.exists() else "no such file"
        raise error(f"{path}: {what}; expected a file (looked from {os.getcwd()})")


def read_json(path: str | os.PathLike[str], error: type[UserError] = UserError) -> dict[str, Any]:
    """The object in a JSON file; raises `error`, naming the file, if it holds none or cannot be read."""
    path = Path(path)
    check_regular(path, error)
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as cause:
        raise error(f"{path}: cannot be read as JSON ({cause}); expected the file as it was written") from None
    if not isinstance(content, dict):
        raise error(f"{path}: holds a JSON {type(content).__name__}; expected an object")
    return content


@contextmanager
def explain_write_errors(path: str | os.PathLike[str], *, full_disk_only: bool = False) -> Iterator[None]:
    """Raises SaveError, in one line with a remedy, where the system refuses to write `path` inside.

    With `full_disk_only`, for that reason alone: where much else is done inside, others may be about other files.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        found = find_refusal(error)
        if found is None or (full_disk_only and found[1] != _FULL):
            raise
        raise SaveError(f"{os.fspath(path)}: could not be written ({found[0]}): {found[1]}") from None


def find_refusal(error: BaseException | None) -> tuple[str, str] | None:
    """The system's reason not to write and the remedy, also where a library hides it behind an error of its own."""
    while isinstance(error, RuntimeError | SafetensorError | SaveError):
        # In safetensors' text alone, as "... (os error 28)"; torch.save raises another error on that of the file
        number = next((n for n in _REMEDIES if f"(os error {n})" in str(error)), None)
        if number is not None:
            return os.strerror(number), _REMEDIES[number]
        error = error.__cause__ or error.__context__
    if isinstance(error, OSError) and error.errno in _REMEDIES:
        return os.strerror(error.errno), _REMEDIES[error.errno]
    return None


@contextmanager
def lock_folder(path: str | os.PathLike[str], otherwise: str | None = None) -> Iterator[None]:
    """Keeps other processes from writing to the same folder, which is made if missing.

    Raises:
        OutputFolderError: If another process holds it (`otherwise` says what else than waiting the user can do; None
            waits), or it cannot be made or written.
    """
    import fcntl  # not on Windows, where all but training works

    folder = Path(path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = open(folder / LOCK_NAME, "a+")  # noqa: SIM115  (closed below, where errors mean something else)
    except OSError as error:
        reason, remedy = find_refusal(error) or (error.strerror, "name another place")
        raise OutputFolderError(f"{folder}: cannot be written to ({reason}): {remedy}") from None
    with file:
        try:
            # A record lock, which goes with its process however that ends. One of flock would stay as long as the
            # workers of a data loader, which inherit it. Over NFS it needs lockd (version 3), or version 4
            fcntl.lockf(file, fcntl.LOCK_EX | (fcntl.LOCK_NB if otherwise else 0))
        except (BlockingIOError, PermissionError):  # depends on the system
            file.seek(0)
            holder = file.read().strip() or "another process"
            raise OutputFolderError(f"{folder}: {holder} is writing to it: wait for its end, or {otherwise}") from None
        except OSError:  # a file system without locks: rather no protection than no training
            pass
        with suppress(OSError):  # who holds it is good to know, but a full disk is no reason not to start
            os.truncate(file.fileno(), 0)
            os.write(file.fileno(), f"process {os.getpid()} on {socket.gethostname()}".encode())
        yield


def _is_running(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # somebody else's
        pass
    return True


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _start(path: Path) -> str:
    """How names beside `path` begin: with the machine, because another one numbers its processes itself."""
    return f".{path.name}.{socket.gethostname()}-"


def _leftovers(path: Path, state: str) -> list[Path]:
    """What processes of this machine that are no more have left beside `path`."""
    found = path.parent.glob(f"{glob.escape(_start(path))}*.{state}")
    owners = {entry: entry.name.removeprefix(_start(path)).partition(".")[0] for entry in found}
    return [entry for entry, owner in owners.items() if owner.isdecimal() and not _is_running(int(owner))]


def _aside(path: Path) -> Path:
    """A name beside `path` for this process alone; removes what processes that are no more have left there."""
    for leftover in _leftovers(path, "incomplete"):
        _remove(leftover)
    aside = path.with_name(f"{_start(path)}{os.getpid()}.incomplete")
    _remove(aside)
    return aside


@contextmanager
def atomic_path(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Gives a path beside `path` to write to, and moves that file to `path` when the block ends without an error.

    Whatever interrupts the writing, `path` holds its old content or all of the new one.

    Raises:
        SaveError: If the system refuses to write.
    """
    path = Path(path)
    with explain_write_errors(path):
        aside = _aside(path)
        try:
            aside.touch()
            mode = aside.stat().st_mode  # save_file makes it private
        except FileNotFoundError:
            raise SaveError(f"{path}: could not be written (no such folder): name one that exists") from None
        try:
            yield aside
            flush(aside)
            aside.chmod(mode)
            os.replace(aside, path)
        finally:
            aside.unlink(missing_ok=True)


@contextmanager
def write_atomically(path: str | os.PathLike[str], mode: str = "wb") -> Iterator[IO[Any]]:
    """Opens a file that replaces `path` when the block ends without an error; see `atomic_path`."""
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
        SaveError: If the system refuses to write.
    """
    path = Path(path)
    for old in _leftovers(path, "replaced"):  # of a process that ended between two renames
        _remove(old) if path.exists() else os.replace(old, path)
    if path.exists() and not path.is_dir():
        raise UserError(f"{path}: is a file; expected the name of a folder to write")
    if path.is_dir() and any(path.iterdir()) and not overwrite:
        raise UserError(f"{path}: the folder is not empty; name another one, or allow it to be replaced (overwrite)")
    with explain_write_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        aside = _aside(path)
        aside.mkdir()
        old = aside.with_suffix(".replaced")
        try:
            yield aside
            if durable:
                flush(aside)
            if path.is_dir():
                os.replace(path, old)
            rename_durably(aside, path)
        finally:
            if old.is_dir() and not path.exists():
                os.replace(old, path)
            for folder in (aside, old):
                shutil.rmtree(folder, ignore_errors=True)


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
