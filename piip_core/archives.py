"""Archives of data sets, downloaded and unpacked: whole files only, and an interrupted run goes on."""

from __future__ import annotations

import os
import shutil
import stat
import urllib.error
import urllib.request
import zipfile
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from tqdm import tqdm

from .errors import UserError, listed
from .files import explain_write_errors

_INCOMPLETE = "incomplete"
_CHUNK = 1 << 20
_TIMEOUT = 60  # seconds without a byte


class ArchiveError(UserError):
    """An archive cannot be downloaded, or is damaged, incomplete or unsafe; the message names it and the entry."""


def download(url: str, path: str | os.PathLike[str]) -> None:
    """Downloads a file, unless it is there; repeated, it goes on where it stopped. It appears when it is complete.

    Raises:
        ArchiveError: If the server refuses, or the connection ends before the file does.
    """
    path = Path(path)
    if path.exists():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f"{path.name}.part")
    try:
        _fetch(url, aside)
    except (urllib.error.URLError, TimeoutError, ConnectionError) as error:
        raise ArchiveError(f"{url}: {error}; {aside} keeps what has come: repeat the command to go on") from error
    os.replace(aside, path)


def _fetch(url: str, aside: Path) -> None:
    """Appends to `aside` what it lacks."""
    have = aside.stat().st_size if aside.exists() else 0
    # An offset into compressed content would mean nothing
    headers = {"Accept-Encoding": "identity"} | ({"Range": f"bytes={have}-"} if have else {})
    try:
        response = urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=_TIMEOUT)
    except urllib.error.HTTPError as error:
        if have and error.code == 416 and error.headers.get("Content-Range") == f"bytes */{have}":
            return  # it is complete
        raise
    with response, open(aside, "ab") as file:
        resumed = response.status == 206 and response.headers.get("Content-Range", "").startswith(f"bytes {have}-")
        if not resumed:  # the server sends everything again
            have = 0
            file.truncate(0)
        length = response.headers.get("Content-Length")
        total = None if length is None else have + int(length)
        options = {"unit": "B", "unit_scale": True, "disable": None}  # None: shown on terminals
        with tqdm(desc=f"Downloading {aside.stem}", initial=have, total=total, **options) as bar:
            while chunk := response.read(_CHUNK):
                file.write(chunk)
                bar.update(len(chunk))
        file.flush()
        os.fsync(file.fileno())
    if total is not None and aside.stat().st_size != total:
        raise ConnectionError(f"only {aside.stat().st_size} of {total} bytes have come")


@dataclass(frozen=True)
class Unpacked:
    """What `unpack_images` did, in numbers of files: written now, and there already."""

    written: int
    present: int


def unpack_images(archive: str | os.PathLike[str], folder: str | os.PathLike[str]) -> Unpacked:
    """Unpacks a zip archive so that its images lie in `folder`.

    Leading folders in the archive up to one named as `folder` are left out: `train2017/1.jpg` becomes `1.jpg` in
    `coco/train2017`. A folder that does not exist is filled under another name and renamed when complete. Into one that
    exists, the files are written that are missing or shorter than in the archive; nothing else in it is touched.

    Raises:
        ArchiveError: If the archive is missing, damaged or encrypted; an entry leads out of the folder, is a link, or
            is there twice; or the disk has too little space. Of unsafe archives nothing is written.
    """
    archive, folder = Path(archive), Path(folder)
    if folder.exists() and not folder.is_dir():
        raise ArchiveError(f"{folder}: is a file; expected a folder, or nothing yet")
    with _open(archive) as opened:
        entries = _plan(opened, archive, folder.name)
        in_place = folder.is_dir() and any(folder.iterdir())
        target = folder if in_place else folder.with_name(f".{folder.name}.{_INCOMPLETE}")
        target.mkdir(parents=True, exist_ok=True)
        missing = {name: info for name, info in entries.items() if _size(target / name) < info.file_size}
        check_space(target, archive, sum(info.file_size for info in missing.values()))
        _write(opened, archive, target, missing)
    if not in_place:
        os.sync()  # the new name must not be on the disk before the files are
        os.replace(target, folder)
    return Unpacked(written=len(missing), present=len(entries) - len(missing))


def _open(archive: Path) -> zipfile.ZipFile:
    if not archive.is_file():
        raise ArchiveError(f"{archive}: no such file; expected a downloaded .zip archive")
    try:
        return zipfile.ZipFile(archive)
    except Exception as error:  # of any type, depending on which bytes are wrong
        raise ArchiveError(
            f"{archive}: not a complete zip archive ({error}; {archive.stat().st_size} bytes): continue or repeat its "
            "download"
        ) from error


def _plan(opened: zipfile.ZipFile, archive: Path, folder_name: str) -> dict[str, zipfile.ZipInfo]:
    """Maps the path of every file below the target folder to its entry."""
    plan: dict[str, zipfile.ZipInfo] = {}
    bad: list[str] = []
    for info in opened.infolist():
        path = PurePosixPath(info.filename)
        # zipfile has replaced the system's other separators; a drive letter or a backslash never is an image of ours
        if not path.parts:
            bad.append(f"{info.filename!r} is no name")
        elif path.is_absolute() or ".." in path.parts or any(c in info.filename for c in "\\:"):
            bad.append(f"{info.filename!r} leads out of the folder")
        elif info.is_dir() or path.parts[0] == "__MACOSX" or path.name.startswith("."):
            continue
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
        found = listed(bad, separator="; ")
        raise ArchiveError(f"{archive}: {found}: nothing was unpacked; download it again from its source")
    if not plan:
        raise ArchiveError(f"{archive}: holds no files; expected images for {folder_name}")
    return plan


def check_space(target: Path, archive: Path, needed: int) -> None:
    """Raises ArchiveError if the disk of a folder has less than the bytes that unpacking still needs."""
    free = shutil.disk_usage(target).free
    if needed > free:
        raise ArchiveError(
            f"{target}: {free / 1e9:.1f} GB free, but {needed / 1e9:.1f} GB are still to be unpacked of {archive}: "
            "free some space or choose another disk; a repeated command goes on where this one stopped"
        )


def _write(opened: zipfile.ZipFile, archive: Path, target: Path, entries: dict[str, zipfile.ZipInfo]) -> None:
    """Writes the files, each under another name and then renamed."""
    total = sum(info.file_size for info in entries.values())
    with tqdm(desc=f"Unpacking {archive.name}", total=total, unit="B", unit_scale=True, disable=None) as bar:
        for name, info in entries.items():
            path = target / name
            # No sync per file as in piip_core.files: half a million of them would take hours on a hard disk
            aside = path.with_name(f".{path.name}.{_INCOMPLETE}")
            try:
                with explain_write_errors(path):
                    path.parent.mkdir(parents=True, exist_ok=True)
                    with opened.open(info) as source, open(aside, "wb") as file:
                        shutil.copyfileobj(source, file, _CHUNK)
                    os.replace(aside, path)
            except UserError:
                raise
            except Exception as error:  # of any type, depending on which bytes are wrong
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
