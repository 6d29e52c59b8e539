"""Reading checkpoints of every format: single files, shards with an index, DeepSpeed folders."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..errors import CheckpointError, listed
from ..files import check_regular, read_json
from .deepspeed import deepspeed_folder, read_deepspeed
from .formats import DESCRIPTION, CheckpointFile, LazyState, read_file

INDEX_SUFFIX = ".index.json"
# What a folder may hold, first choice first: the same weights are often there as safetensors and as PyTorch files
_FOLDER_FILES = [name + end for name in ("model.safetensors", "pytorch_model.bin") for end in (INDEX_SUFFIX, "")]


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
    else:
        source = _find_in_folder(path) if path.is_dir() else path
        if source.name.endswith(INDEX_SUFFIX) and not ema:
            file = _read_sharded(source, unsafe_pickle=unsafe_pickle, verify=verify)
        else:
            file = read_file(source, unsafe_pickle=unsafe_pickle, ema=ema, verify=verify)
    if all(key.startswith("module.") for key in file.state):  # of DataParallel
        return replace(file, state=file.state.below("module."))
    return file


def read_index(path: Path) -> tuple[dict[str, str], dict[str, Any]]:
    """Tensor name -> file name, and the metadata of an index."""
    content = read_json(path, CheckpointError)
    files = content.get("weight_map")
    if not isinstance(files, dict) or not files or not all(isinstance(file, str) for file in files.values()):
        raise CheckpointError(f"{path}: not an index: expected names of files by names of tensors under 'weight_map'")
    outside = sorted({file for file in files.values() if Path(file).name != file})
    if outside:
        raise CheckpointError(f"{path}: names {outside[0]!r}; expected files of its own folder")
    metadata = content.get("metadata")
    return files, metadata if isinstance(metadata, dict) else {}


def _find_in_folder(folder: Path) -> Path:
    """The index or file of a folder in the layout of Hugging Face's libraries."""
    for name in _FOLDER_FILES:
        if (folder / name).is_file():
            return folder / name
    raise CheckpointError(
        f"{folder}: expected {', '.join(_FOLDER_FILES)} or a DeepSpeed checkpoint in this folder, found none of them. "
        "Give the path of one file"
    )


def _read_sharded(path: Path, *, unsafe_pickle: bool, verify: bool) -> CheckpointFile:
    """The state dict that an index describes; it must name every tensor of its files, and in the right one."""
    files, metadata = read_index(path)
    names = list(dict.fromkeys(files.values()))
    missing = [name for name in names if not (path.parent / name).is_file()]
    if missing:
        raise CheckpointError(
            f"{path}: {len(missing)} of its {len(names)} files are missing: {listed(missing)}. Download them into "
            f"{path.parent}"
        )
    shards = [read_file(path.parent / name, unsafe_pickle=unsafe_pickle, verify=verify) for name in names]
    for shard in shards:
        expected = {key for key, file in files.items() if file == shard.path.name}
        if absent := sorted(expected - shard.state.keys()):
            raise CheckpointError(f"{shard.path}: lacks {listed(absent)}, which {path.name} places there")
        if strange := sorted(shard.state.keys() - expected):
            raise CheckpointError(f"{shard.path}: holds {listed(strange)}, which {path.name} does not place there")
    entries = {key: entry for shard in shards for key, entry in shard.state.entries.items()}
    extras = dict.fromkeys(key for shard in shards for key in shard.extras)
    state = LazyState({key: entries[key] for key in files})
    return CheckpointFile(path, state, tuple(extras), metadata.get(DESCRIPTION))
