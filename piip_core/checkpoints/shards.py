"""Checkpoints in several files with an index of which tensor is where, as Hugging Face's libraries write them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import CheckpointError
from ..files import read_json
from .lazy import LazyState, LazyTensor
from .single import DESCRIPTION, CheckpointFile, listed, read_single

__all__ = ["INDEX_SUFFIX", "find_in_folder", "read_index", "read_sharded"]

INDEX_SUFFIX = ".index.json"
# What a folder may hold, first choice first: the same weights are often there as safetensors and as PyTorch files
_FOLDER_FILES = ("model.safetensors.index.json", "model.safetensors", "pytorch_model.bin.index.json")
_FOLDER_FILES += ("pytorch_model.bin",)


def find_in_folder(folder: Path) -> Path:
    """The index or file of a folder in the layout of Hugging Face's libraries.

    Raises:
        CheckpointError: If the folder holds none, or several indices of other names.
    """
    for name in _FOLDER_FILES:
        if (folder / name).is_file():
            return folder / name
    indices = sorted(folder.glob(f"*{INDEX_SUFFIX}"))
    if len(indices) == 1:
        return indices[0]
    found = ", ".join(path.name for path in indices) or "none of them"
    raise CheckpointError(
        f"{folder}: expected one checkpoint in this folder: {', '.join(_FOLDER_FILES)}, another *{INDEX_SUFFIX}, or a "
        f"DeepSpeed checkpoint; found {found}. Give the path of one file"
    )


def read_index(path: Path) -> tuple[dict[str, str], dict[str, Any]]:
    """Tensor name -> file name, and the metadata of an index.

    Raises:
        CheckpointError: If it is not an index, names a tensor twice or files outside its folder.
    """
    content = read_json(path, CheckpointError, object_pairs_hook=_without_duplicates)
    places = content.get("weight_map")
    if not isinstance(places, dict) or not places or not all(isinstance(file, str) for file in places.values()):
        raise CheckpointError(f"{path}: not an index: expected names of files by names of tensors under 'weight_map'")
    outside = sorted({file for file in places.values() if Path(file).name != file})
    if outside:
        raise CheckpointError(f"{path}: names {outside[0]!r}; expected files of its own folder")
    metadata = content.get("metadata")
    return places, metadata if isinstance(metadata, dict) else {}


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(name for name in names if names.count(name) > 1)!r} is named twice")
    return content


def read_sharded(path: Path, unsafe_pickle: bool, *, verify: bool = False) -> CheckpointFile:
    """Reads the state dict that an index describes; each tensor from its file when it is asked for.

    Raises:
        CheckpointError: If a file is missing or unreadable, or holds other tensors than the index says.
    """
    places, metadata = read_index(path)
    names = list(dict.fromkeys(places.values()))
    missing = [name for name in names if not (path.parent / name).is_file()]
    if missing:
        raise CheckpointError(
            f"{path}: {len(missing)} of its {len(names)} files are missing: {listed(missing)}. Download them into "
            f"{path.parent}"
        )
    entries: dict[str, LazyTensor] = {}
    extras: dict[str, None] = {}
    for name in names:
        shard = read_single(path.parent / name, unsafe_pickle, verify=verify)
        _check_shard(path, shard, places, entries)
        entries |= shard.state.entries
        extras |= dict.fromkeys(shard.extras)
    ordered = LazyState({key: entries[key] for key in places})
    return CheckpointFile(path, ordered, extras=tuple(extras), description=metadata.get(DESCRIPTION))


def _check_shard(
    index: Path, shard: CheckpointFile, places: Mapping[str, str], earlier: Mapping[str, LazyTensor]
) -> None:
    name = shard.path.name
    absent = [key for key, file in places.items() if file == name and key not in shard.state]
    if absent:
        raise CheckpointError(f"{shard.path}: lacks {listed(absent)}, which {index.name} places there")
    twice = [key for key in shard.state if places.get(key, name) != name or key in earlier]
    if twice:
        raise CheckpointError(f"{shard.path}: holds {listed(twice)}, which {index.name} places in another file")
    unnamed = [key for key in shard.state if key not in places]
    if unnamed:
        raise CheckpointError(f"{shard.path}: holds {listed(unnamed)}, which {index.name} does not name")
