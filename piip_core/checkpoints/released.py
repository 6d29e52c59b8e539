"""Released models by name: huggingface_hub fetches them, they are checked, converted once and kept."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from huggingface_hub import constants, hf_hub_download, snapshot_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from .. import zoo
from ..errors import CheckpointError, ConfigError, UserError
from ..files import explain_write_errors, lock_folder, read_json, write_atomically
from .convert_file import convert_file
from .reading import INDEX_SUFFIX

_RECORD = "source.json"
# Of a repository that is a model: configuration, weights, tokenizer
_FOLDER_FILES = ["*.json", "*.safetensors", "*.bin", "*.model"]
# The hub names a large file by its SHA-256, and the cache keeps it under this name
_SHA256 = re.compile("[0-9a-f]{64}")
_LOG_IN = "log in (hf auth login) or set HF_TOKEN"


def find_checkpoint(source: str | os.PathLike[str], *, ema: bool = False) -> Path:
    """The path of a checkpoint: `source` if it exists, or what `fetch_released` makes of it if it is a name.

    Raises:
        CheckpointError: If it is a single word that is neither, or the model cannot be had. Other paths come back as
            they are.
    """
    path = Path(source)
    if path.exists() or path.suffix or path.name != str(source):
        return path
    try:
        return fetch_released(path.name, ema=ema)
    except ConfigError as error:
        raise CheckpointError(f"{source}: no such file (looked from {os.getcwd()}), and {error}") from None


def fetch_released(name: str, *, ema: bool = False) -> Path:
    """The checkpoint of a released detector, segmentor or classifier under our names; see `keep_converted`.

    Args:
        name: See `zoo.released`.
        ema: Of a classifier, the moving average of the weights.

    Returns:
        A .safetensors file, or the index of several; of the whole model, heads included.

    Raises:
        ConfigError: For an unknown name; the message lists the closest ones.
        CheckpointError: If it cannot be fetched, is another file than expected, or is no checkpoint of that model.
        SaveError: If the disk is full or may not be written.
    """
    released = zoo.released(name)
    if isinstance(released.entry, zoo.MultimodalEntry):
        raise CheckpointError(f"{name}: is a chat model; expected a detector, segmentor or classifier")
    config = released.entry.config

    def convert(source: Path, target: Path) -> Path:
        return convert_file(source, target, config=config, ema=ema).path

    return keep_converted(released, "model_ema.safetensors" if ema else "model.safetensors", convert)


def keep_converted(released: zoo.Released, kept: str, convert: Callable[[Path, Path], Path]) -> Path:
    """Downloads a released model into the cache of huggingface_hub, and converts it unless that was done before.

    The result stays in `assets/piip/released/NAME` of `HF_HOME` (`HF_ASSETS_CACHE` moves that), beside a record of the
    revision, sizes and hashes that were fetched: later downloads are of that revision and have to be the same files.

    Args:
        released: The model.
        kept: Name of the result in that folder.
        convert: Makes it of the downloaded file or folder (first argument) at a path (second), and returns what it
            wrote.

    Raises:
        CheckpointError: As `fetch_released`.
        SaveError: As `fetch_released`.
    """
    folder = _folder(released)
    if (found := _find(folder / kept, released)) is not None:
        return found
    with lock_folder(folder):  # the processes of one training wait for the first of them
        if (found := _find(folder / kept, released)) is not None:
            return found
        known = {} if released.sha256 else _read_record(folder)  # of what is known, nothing needs remembering
        with _explain_failures(released), explain_write_errors(constants.HF_HUB_CACHE):
            source, record = _download(released, known.get("revision", released.revision))
        _check(source, record, known, released)
        try:
            written = convert(source, folder / kept)
        except CheckpointError as error:
            raise CheckpointError(f"{error}; to fetch it again, delete {source.resolve()}") from error
        with write_atomically(folder / _RECORD, "w") as file:
            json.dump(record, file, indent=2)
    return written


def read_record(released: zoo.Released) -> dict[str, Any]:
    """Repository, revision, and size and hash by file of what was fetched before; nothing if nothing was."""
    return _read_record(_folder(released))


def recorded_size(released: zoo.Released) -> int | None:
    """Bytes of what is downloaded, if that is known."""
    files = read_record(released).get("files", {})
    return sum(facts["size"] for facts in files.values()) or released.size


def _folder(released: zoo.Released) -> Path:
    """As `huggingface_hub.cached_assets_path` lays them out, which would make it."""
    return Path(constants.HF_ASSETS_CACHE, "piip", "released", released.name)


def _read_record(folder: Path) -> dict[str, Any]:
    path = folder / _RECORD
    return read_json(path, CheckpointError) if path.is_file() else {}


def _find(target: Path, released: zoo.Released) -> Path | None:
    """What was converted and recorded before, unless it came from another file than the table names now."""
    record = _read_record(target.parent)
    if not record or released.sha256 not in (None, record["files"].get(released.file, {}).get("sha256")):
        return None
    paths = (target, target.with_name(target.name + INDEX_SUFFIX))
    return next((path for path in paths if path.exists()), None)


def _download(released: zoo.Released, revision: str) -> tuple[Path, dict[str, Any]]:
    """The file or folder in the cache of the hub's client, and the record of it."""
    if released.file is None:
        source = root = Path(snapshot_download(released.repository, revision=revision, allow_patterns=_FOLDER_FILES))
        files = sorted({path for pattern in _FOLDER_FILES for path in root.glob(pattern)})
    else:
        source = Path(hf_hub_download(released.repository, released.file, revision=revision))
        root, files = source.parents[released.file.count("/")], [source]
    facts = {str(path.relative_to(root)): {"size": path.stat().st_size, "sha256": _sha256(path)} for path in files}
    return source, {"repository": released.repository, "revision": root.name, "files": facts}


def _sha256(path: Path) -> str:
    total = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(2**22):
            total.update(block)
    return total.hexdigest()


def _check(source: Path, record: dict[str, Any], known: dict[str, Any], released: zoo.Released) -> None:
    """Compares what came with the table, the record of the first download, and the hub's own word."""
    for name, facts in record["files"].items():
        path = source / name if released.file is None else source
        blob = Path(os.readlink(path)) if path.is_symlink() else path
        promised = {
            "the table of released models": {"size": released.size, "sha256": released.sha256},
            "the first download": known.get("files", {}).get(name, {}),
            "the hub": {"sha256": blob.name if _SHA256.fullmatch(blob.name) else None},
        }
        for who, expected in promised.items():
            for kind, value in expected.items():
                if value not in (None, facts[kind]):
                    raise CheckpointError(
                        f"{released.name}: {path.resolve()} has {kind} {facts[kind]}, by {who} it is {value}: delete "
                        "this file and fetch it again"
                    )


@contextmanager
def _explain_failures(released: zoo.Released) -> Iterator[None]:
    """Says in one sentence why nothing came."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # the hub client raises its own, httpx's and OSErrors, depending on what fails
        match error:
            case GatedRepoError():
                reason = f"its repository is gated: accept its terms on the hub, then {_LOG_IN}"
            case RepositoryNotFoundError():
                reason = f"there is no such repository, or it is private: {_LOG_IN}"
            case LocalEntryNotFoundError():
                reason = f"it is not in the cache, and not to be had: {_first_line(error.__cause__ or error)}"
            case EntryNotFoundError() | RevisionNotFoundError():
                reason = "the hub has no such file, or not any more"
            case _:
                reason = _first_line(error)
        address = released.url.replace("https://huggingface.co", constants.ENDPOINT, 1)
        raise CheckpointError(f"{released.name} ({address}) could not be fetched: {reason}") from error


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
