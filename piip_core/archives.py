"""Archives of data sets, downloaded and unpacked: whole files only, and an interrupted run goes on."""

from __future__ import annotations

import os
import shutil
import stat
import urllib.error
import urllib.request
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from tqdm import tqdm

from .errors import SaveError, UserError
from .files import find_refusal

__all__ = ["ArchiveError", "DownloadError", "Unpacked", "check_space", "download", "unpack_images"]

_INCOMPLETE = "incomplete"
_CHUNK = 1 << 20
_TIMEOUT = 60  # seconds without a byte


class DownloadError(UserError):
    """A file cannot be downloaded; the message names the address and how to go on."""


class ArchiveError(UserError):
    """An archive is damaged, incomplete or unsafe; the message names it and the entry."""


def download(url: str, path: str | os.PathLike[str], *, progress: bool = True) -> Path:
    """Downloads a file beside its place and renames it when it is complete; repeated, it goes on where it stopped.

    Args:
        url: Address.
        path: File to write. If it exists, nothing is done.
        progress: Show a progress bar.

    Returns:
        `path`.

    Raises:
        DownloadError: If the server refuses, or the connection ends before the file does.
    """
    path = Path(path)
    if path.exists():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f"{path.name}.part")
    try:
        _fetch(url, aside, progress)
    except urllib.error.HTTPError as error:
        raise DownloadError(
            f"{url}: the server answers {error.code} {error.reason}; get {path.name} otherwise"
        ) from error
    except (urllib.error.URLError, TimeoutError, ConnectionError) as error:
        raise DownloadError(f"{url}: {error}; {aside} keeps what has come: repeat the command to go on") from error
    os.replace(aside, path)
    return path


def _fetch(url: str, aside: Path, progress: bool) -> None:
    """Appends to `aside` what it lacks."""
    have = aside.stat().st_size if aside.exists() else 0
    # An offset into compressed content would mean nothing
    headers = {"Accept-Encoding": "identity"} | ({"Range": f"bytes={have}-"} if have else {})
    try:
        response = urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=_TIMEOUT)
    except urllib.error.HTTPError as error:
        complete = f"bytes */{have}"
        if have and error.code == 416 and error.headers.get("Content-Range") == complete:
            return
        raise
    with response, open(aside, "ab") as file:
        resumed = response.status == 206 and response.headers.get("Content-Range", "").startswith(f"bytes {have}-")
        if not resumed:  # the server sends everything again
            have = 0
            file.truncate(0)
        length = response.headers.get("Content-Length")
        total = None if length is None else have + int(length)
        bar = tqdm(
            initial=have,
            total=total,
            desc=f"Downloading {aside.stem}",
            unit="B",
            unit_scale=True,
            disable=None if progress else True,
        )
        with bar:
            while chunk := response.read(_CHUNK):
                file.write(chunk)
                bar.update(len(chunk))
        file.flush()
        os.fsync(file.fileno())
    if total is not None and aside.stat().st_size != total:
        raise ConnectionError(f"only {aside.stat().st_size} of {total} bytes have come")


@dataclass(frozen=True)
class Unpacked:
    """What `unpack_images` did, in numbers of files."""

    written: int
    present: int
    """Were there already."""
    ignored: int
    """Hidden files and folders that macOS adds to archives."""


def unpack_images(
    archive: str | os.PathLike[str], folder: str | os.PathLike[str], *, progress: bool = True
) -> Unpacked:
    """Unpacks a zip archive so that its images lie in `folder`.

    Leading folders in the archive up to one named as `folder` are left out: `train2017/1.jpg` becomes `1.jpg` in
    `coco/train2017`. A folder that does not exist is filled under another name and renamed when complete. Into one that
    exists, the files are written that are missing or shorter than in the archive; nothing else in it is touched.

    Args:
        archive: The .zip file.
        folder: Folder for the images.
        progress: Show a progress bar.

    Raises:
        ArchiveError: If the archive is missing, damaged or encrypted; an entry leads out of the folder, is a link, or
            is there twice; or the disk has too little space. Of unsafe archives nothing is written.
    """
    archive, folder = Path(archive), Path(folder)
    if folder.exists() and not folder.is_dir():
        raise ArchiveError(f"{folder}: is a file; expected a folder, or nothing yet")
    with _opened(archive) as opened:
        entries, ignored = _plan(opened, archive, folder.name)
        in_place = folder.is_dir() and any(folder.iterdir())
        target = folder if in_place else folder.with_name(f".{folder.name}.{_INCOMPLETE}")
        target.mkdir(parents=True, exist_ok=True)
        if not in_place:
            _remove_strangers(target, {target / name for name in entries})
        missing = {name: info for name, info in entries.items() if _size(target / name) < info.file_size}
        check_space(target, archive, sum(info.file_size for info in missing.values()))
        _write(opened, archive, target, missing, progress)
    if not in_place:
        os.sync()  # the new name must not be on the disk before the files are
        os.replace(target, folder)
    return Unpacked(written=len(missing), present=len(entries) - len(missing), ignored=ignored)


@contextmanager
def _opened(archive: Path) -> Iterator[zipfile.ZipFile]:
    """Opens a zip archive; errors name it."""
    if not archive.is_file():
        raise ArchiveError(f"{archive}: no such file; expected a downloaded .zip archive")
    try:
        opened = zipfile.ZipFile(archive)
    except Exception as error:  # of any type, depending on which bytes are wrong
        raise ArchiveError(
            f"{archive}: not a complete zip archive ({error}; {archive.stat().st_size} bytes): continue or repeat its "
            "download"
        ) from error
    with opened:
        yield opened


def _plan(opened: zipfile.ZipFile, archive: Path, folder_name: str) -> tuple[dict[str, zipfile.ZipInfo], int]:
    """Maps the path of every file below the target folder to its entry; also counts what is left out."""
    plan: dict[str, zipfile.ZipInfo] = {}
    ignored, bad = 0, []
    for info in opened.infolist():
        path = PurePosixPath(info.filename)
        # zipfile has replaced the system's other separators; a drive letter or a backslash never is an image of ours
        if not path.parts:
            bad.append(f"{info.filename!r} is no name")
        elif path.is_absolute() or ".." in path.parts or any(c in info.filename for c in "\\:"):
            bad.append(f"{info.filename!r} leads out of the folder")
        elif info.is_dir():
            continue
        elif path.parts[0] == "__MACOSX" or path.name.startswith("."):
            ignored += 1
        elif stat.S_ISLNK(info.external_attr >> 16):
            bad.append(f"{info.filename!r} is a link")
        elif info.flag_bits & 1:
            bad.append(f"{info.filename!r} is encrypted")
        else:
            parts = path.parts
            if folder_name in parts[:-1]:
                parts = parts[parts.index(folder_name) + 1 :]
            name = "/".join(parts)
            if name in plan:
                bad.append(f"{info.filename!r} and {plan[name].filename!r} would be the same file")
            plan[name] = info
    if bad:
        more = f" and {len(bad) - 5} more" if len(bad) > 5 else ""
        raise ArchiveError(
            f"{archive}: {'; '.join(bad[:5])}{more}: nothing was unpacked; download it again from its source"
        )
    if not plan:
        raise ArchiveError(f"{archive}: holds no files; expected images for {folder_name}")
    return plan, ignored


def _remove_strangers(target: Path, wanted: set[Path]) -> None:
    """Removes what an earlier run left in its own unfinished folder and that does not belong to this archive."""
    for folder, _, names in os.walk(target):
        for name in names:
            if (path := Path(folder, name)) not in wanted:
                path.unlink()


def check_space(target: Path, archive: Path, needed: int) -> None:
    """Raises ArchiveError if the disk of a folder has less than the bytes that unpacking still needs."""
    free = shutil.disk_usage(target).free
    if needed > free:
        raise ArchiveError(
            f"{target}: {free / 1e9:.1f} GB free, but {needed / 1e9:.1f} GB are still to be unpacked of {archive}: "
            "free some space or choose another disk; a repeated command goes on where this one stopped"
        )


def _write(
    opened: zipfile.ZipFile, archive: Path, target: Path, entries: dict[str, zipfile.ZipInfo], progress: bool
) -> None:
    """Writes the files, each aside and then renamed."""
    total = sum(info.file_size for info in entries.values())
    bar = tqdm(
        total=total, desc=f"Unpacking {archive.name}", unit="B", unit_scale=True, disable=None if progress else True
    )
    with bar:
        for name, info in entries.items():
            path = target / name
            # No sync per file as in piip_core.files: half a million of them would take hours on a hard disk
            aside = path.with_name(f".{path.name}.{_INCOMPLETE}")
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                with opened.open(info) as source, open(aside, "wb") as file:
                    shutil.copyfileobj(source, file, _CHUNK)
                os.replace(aside, path)
            except Exception as error:  # of any type, depending on which bytes are wrong
                if refusal := find_refusal(error):
                    raise SaveError(f"{path}: could not be written ({refusal[0]}): {refusal[1]}") from None
                raise ArchiveError(
                    f"{archive}: entry {info.filename!r} is damaged ({error}): download it again"
                ) from error
            finally:
                with suppress(OSError):
                    aside.unlink(missing_ok=True)
            bar.update(info.file_size)


def _size(path: Path) -> int:
    """The size of a file; -1 if there is none."""
    try:
        return path.stat().st_size
    except (OSError, ValueError):  # a name that cannot be one, too: writing it says why
        return -1
