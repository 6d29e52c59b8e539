"""Writing checkpoint files, large ones in shards, so that a crash leaves the old ones or the new ones."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from ..errors import CheckpointError
from ..files import atomic_path, write_atomically
from .lazy import LazyState
from .read import INDEX_SUFFIX, read_index
from .single import CHECKSUM, DESCRIPTION, checksum

__all__ = ["write_checkpoint"]

MAX_SHARD_BYTES = 5 * 10**9  # as Hugging Face's libraries
# Writing this much takes long enough to want a progress bar
_LARGE_BYTES = 10**9
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
        CheckpointError: If `path` is a folder, or `max_shard_bytes` less than 1.
    """
    path, lazy = Path(path), LazyState.of(state)
    if max_shard_bytes < 1:
        raise CheckpointError(f"max_shard_bytes={max_shard_bytes}: expected at least 1")
    if path.is_dir():
        raise CheckpointError(f"{path}: is a folder; expected the name of a file to write, such as model.safetensors")
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix != ".safetensors":
        _write_torch(path, lazy, wrapper, description)
        return path
    old_index = path.with_name(path.name + INDEX_SUFFIX)
    old_shards = _shards_of(old_index)
    plan = _plan(lazy, max_shard_bytes)
    if len(plan) > 1:
        written = _write_shards(path, lazy, plan, description, old_shards)
        path.unlink(missing_ok=True)
    else:
        with atomic_path(path) as aside:
            _save(aside, lazy, list(lazy), {DESCRIPTION: json.dumps(description)} if description else {})
        written = {path.name}
        old_index.unlink(missing_ok=True)
    for name in old_shards - written:
        (path.parent / name).unlink(missing_ok=True)
    return old_index if len(plan) > 1 else path


def _write_torch(path: Path, state: LazyState, wrapper: str, description: Mapping[str, Any] | None) -> None:
    content = {wrapper: {key: tensor.detach().contiguous() for key, tensor in state.items()}}
    content |= {DESCRIPTION: dict(description)} if description else {}
    with write_atomically(path) as file, _progress(path, state.nbytes) as bar:
        torch.save(content, _Counting(file, bar))


class _Counting:
    """A file that tells a progress bar what is written to it."""

    def __init__(self, file: Any, bar: tqdm) -> None:
        self.file, self.bar = file, bar

    def write(self, data: Any) -> int:
        self.bar.update(memoryview(data).nbytes)
        return self.file.write(data)

    def flush(self) -> None:
        self.file.flush()


def _progress(path: Path, nbytes: int) -> tqdm:
    disable = None if nbytes >= _LARGE_BYTES else True  # None: shown on terminals
    return tqdm(total=nbytes, desc=path.name, unit="B", unit_scale=True, disable=disable)


def _plan(state: LazyState, max_bytes: int) -> list[list[str]]:
    """Names of the tensors of each shard, in order; as many in one as its size allows."""
    shards: list[list[str]] = [[]]
    size = 0
    for key, entry in state.entries.items():
        if shards[-1] and size + entry.nbytes > max_bytes:
            shards.append([])
            size = 0
        shards[-1].append(key)
        size += entry.nbytes
    return shards


def _shards_of(index: Path) -> set[str]:
    """Files of the checkpoint that is there already, if it is a sharded one."""
    try:
        return set(read_index(index)[0].values()) if index.is_file() else set()
    except CheckpointError:
        return set()  # a broken index is replaced; nobody can tell which files were its own


def _write_shards(
    path: Path, state: LazyState, plan: list[list[str]], description: Mapping[str, Any] | None, old_shards: set[str]
) -> set[str]:
    # Never the names of the shards that the old index lists: they stay complete until the new index replaces it
    for ending in _ENDINGS:
        names = [f"{path.stem}-{i:05d}-of-{len(plan):05d}{ending}.safetensors" for i in range(1, len(plan) + 1)]
        if not old_shards & set(names):
            break
    done: list[Path] = []
    try:
        with _progress(path, state.nbytes) as bar:
            for name, keys in zip(names, plan, strict=True):
                with atomic_path(path.with_name(name)) as aside:
                    _save(aside, state, keys, {})
                done.append(path.with_name(name))
                bar.update(sum(state.entries[key].nbytes for key in keys))
        metadata: dict[str, Any] = {"total_size": state.nbytes}
        metadata |= {DESCRIPTION: dict(description)} if description else {}
        places = {key: name for name, keys in zip(names, plan, strict=True) for key in keys}
        with write_atomically(path.with_name(path.name + INDEX_SUFFIX), "w") as file:
            json.dump({"metadata": metadata, "weight_map": places}, file, indent=2)
    except BaseException:
        for shard in done:
            shard.unlink(missing_ok=True)
        raise
    return set(names)


def _save(path: Path, state: LazyState, keys: list[str], metadata: Mapping[str, str]) -> None:
    tensors: dict[str, Tensor] = {}
    storages: set[int] = set()
    for key in keys:
        tensor = state[key].detach().contiguous()
        # The format has no tensors that share memory: tied weights are stored for each name
        if tensor.untyped_storage().data_ptr() in storages:
            tensor = tensor.clone()
        storages.add(tensor.untyped_storage().data_ptr())
        tensors[key] = tensor
    save_file(tensors, path, metadata={"format": "pt", CHECKSUM: checksum(tensors)} | dict(metadata))
