"""Writing checkpoint files, large ones in shards, so that a crash leaves the old ones or the new ones."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import StateDictSplit, split_torch_state_dict_into_shards
from safetensors.torch import save_file
from torch import Tensor

from ..errors import CheckpointError
from ..files import atomic_path, write_atomically
from .formats import CHECKSUM, DESCRIPTION, LazyState, checksum
from .reading import INDEX_SUFFIX, read_index

MAX_SHARD_BYTES = 5 * 10**9  # as Hugging Face's libraries
# Shards are named so, or with the second ending where the files being replaced are named so
_ENDINGS = ("", "-b")


def write_checkpoint(
    path: str | os.PathLike[str],
    state: Mapping[str, Tensor],
    *,
    wrapper: str = "model",
    description: Mapping[str, Any] | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> Path:
    """Writes a state dict; what existed is replaced only once the new one is complete.

    Shards are planned by huggingface_hub; its own writer deletes the old ones first and holds all tensors in memory.

    Args:
        path: Target; ".safetensors" for that format, anything else for a PyTorch file, always a single one.
        state: The tensors. Of a lazy state, no more than one shard of a .safetensors is in memory at a time.
        wrapper: Key of the state dict in a PyTorch file ("model" is what Detectron2 reads).
        description: Plain data to store beside the tensors.
        max_shard_bytes: A larger .safetensors is written as `NAME-00001-of-0000N.safetensors` and so on and an index,
            `NAME.safetensors.index.json`, in the layout of Hugging Face's libraries. A single tensor may exceed it.

    Returns:
        What to read: `path`, or the index.

    Raises:
        CheckpointError: If `path` is a folder.
    """
    path, lazy = Path(path), LazyState.of(state)
    if path.is_dir():
        raise CheckpointError(f"{path}: is a folder; expected the name of a file to write, such as model.safetensors")
    path.parent.mkdir(parents=True, exist_ok=True)
    described = {DESCRIPTION: dict(description)} if description else {}
    if path.suffix != ".safetensors":
        tensors = {key: tensor.detach().contiguous() for key, tensor in lazy.items()}
        with write_atomically(path) as file:
            torch.save({wrapper: tensors} | described, file)
        return path
    index = path.with_name(path.name + INDEX_SUFFIX)
    old_shards = _shards_of(index)
    plan = _plan(path, lazy, max_shard_bytes, old_shards)
    if plan.is_sharded:
        _write_shards(path, index, lazy, plan, described)
        written = set(plan.filename_to_tensors)
        path.unlink(missing_ok=True)
    else:
        _write_safetensors(path, lazy, list(lazy), {key: json.dumps(value) for key, value in described.items()})
        written = {path.name}
        index.unlink(missing_ok=True)
    for name in old_shards - written:
        (path.parent / name).unlink(missing_ok=True)
    return index if plan.is_sharded else path


def _plan(path: Path, state: LazyState, max_bytes: int, old_shards: set[str]) -> StateDictSplit:
    """Which tensors go into which file; none has the name of an old shard, which stays until the new index is there."""
    shapes = {key: torch.empty(e.shape, dtype=e.dtype, device="meta") for key, e in state.entries.items()}
    for ending in _ENDINGS:
        pattern = f"{path.stem}{{suffix}}{ending}.safetensors"
        plan = split_torch_state_dict_into_shards(shapes, filename_pattern=pattern, max_shard_size=max_bytes)
        if not old_shards & plan.filename_to_tensors.keys():
            break
    return plan


def _shards_of(index: Path) -> set[str]:
    """Files of the checkpoint that is there already, if it is a sharded one."""
    try:
        return set(read_index(index)[0].values()) if index.is_file() else set()
    except CheckpointError:
        return set()  # a broken index is replaced; nobody can tell which files were its own


def _write_shards(
    path: Path, index: Path, state: LazyState, plan: StateDictSplit, described: Mapping[str, Any]
) -> None:
    done: list[Path] = []
    try:
        for name, keys in plan.filename_to_tensors.items():
            _write_safetensors(path.with_name(name), state, keys, {})
            done.append(path.with_name(name))
        files = {key: plan.tensor_to_filename[key] for key in state}
        with write_atomically(index, "w") as file:
            json.dump({"metadata": {**plan.metadata, **described}, "weight_map": files}, file, indent=2)
    except BaseException:
        for shard in done:
            shard.unlink(missing_ok=True)
        raise


def _write_safetensors(path: Path, state: LazyState, keys: Sequence[str], metadata: Mapping[str, str]) -> None:
    tensors: dict[str, Tensor] = {}
    storages: set[int] = set()
    for key in keys:
        tensor = state[key].detach().contiguous()
        # The format has no tensors that share memory: tied weights are stored for each name
        if tensor.untyped_storage().data_ptr() in storages:
            tensor = tensor.clone()
        storages.add(tensor.untyped_storage().data_ptr())
        tensors[key] = tensor
    with atomic_path(path) as aside:
        save_file(tensors, aside, metadata={"format": "pt", CHECKSUM: checksum(tensors), **metadata})
