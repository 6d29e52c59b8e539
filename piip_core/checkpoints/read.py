"""Reading checkpoints: files, files in several parts with an index, DeepSpeed folders."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..errors import CheckpointError
from ..files import check_regular, read_json
from .deepspeed import deepspeed_folder, read_deepspeed
from .lazy import LazyState, LazyTensor
from .single import DESCRIPTION, CheckpointFile, listed, read_single

__all__ = ["INDEX_SUFFIX", "read_checkpoint", "read_index"]

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


def read_checkpoint(
    path: str | os.PathLike[str],
    *,
    unsafe_pickle: bool = False,
    master_weights: bool = False,
    ema: bool = False,
    verify: bool = False,
) -> CheckpointFile:
    """Reads a state dict; each of its tensors from the file when it is asked for, so that large ones fit.

    Args:
        path: A PyTorch or .safetensors file; a Hugging Face index (`*.index.json`) or the folder that holds one; a
            DeepSpeed checkpoint: the folder of the run or of one checkpoint, of ZeRO stage 0 to 3.
        unsafe_pickle: Allow Python objects in PyTorch files. Reading such a file can run any code that its author
            put into it; never needed for a plain state dict, nor for what DeepSpeed itself stores.
        master_weights: Of a DeepSpeed checkpoint, take the optimizer's fp32 weights instead of the model's.
        ema: Of a classifier's PyTorch file, take the moving average of the weights, which lies beside them.
        verify: Read every byte and compare it with the sums that PyTorch's files and ours have, to notice bits that
            have changed since.

    Raises:
        CheckpointError: If it does not exist, cannot be read or holds no state dict; the message names the file.
    """
    path = Path(path)
    if not path.exists():
        index = path.with_name(path.name + INDEX_SUFFIX)
        hint = f"There is {index.name}: give that" if index.is_file() else "Give a checkpoint's file or folder"
        raise CheckpointError(f"{path}: no such file (looked from {os.getcwd()}). {hint}")
    if not path.is_dir():
        check_regular(path, CheckpointError)
    folder = deepspeed_folder(path)
    if folder is not None:
        file = read_deepspeed(folder, unsafe_pickle=unsafe_pickle, master_weights=master_weights, verify=verify)
    elif master_weights:
        raise CheckpointError(f"{path}: master weights (--master-weights) are in DeepSpeed folders only")
    elif ema:
        file = read_single(path, unsafe_pickle, ema=True, verify=verify)
    else:
        source = find_in_folder(path) if path.is_dir() else path
        read = read_sharded if source.name.endswith(INDEX_SUFFIX) else read_single
        file = read(source, unsafe_pickle, verify=verify)
    return replace(file, state=_without_data_parallel(file.state))


def _without_data_parallel(state: LazyState) -> LazyState:
    prefix = "module."
    if not all(key.startswith(prefix) for key in state):
        return state
    return state.renamed(key.removeprefix(prefix) for key in state)
