"""Downloading a large file, going on after an interruption."""

from __future__ import annotations

import os
import urllib.error
import urllib.request
from pathlib import Path

from tqdm import tqdm

from .errors import UserError

__all__ = ["DownloadError", "download"]

_CHUNK = 1 << 20
_TIMEOUT = 60  # seconds without a byte


class DownloadError(UserError):
    """A file cannot be downloaded; the message names the address and how to go on."""


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
