"""Reading and writing checkpoints: files, sharded files, DeepSpeed folders."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

from ..errors import CheckpointError
from ..files import check_regular
from .deepspeed import deepspeed_folder, read_deepspeed
from .lazy import LazyState
from .shards import INDEX_SUFFIX, find_in_folder, read_sharded
from .single import CheckpointFile, load_torch_file, read_single
from .writing import write_checkpoint

__all__ = ["CheckpointFile", "load_torch_file", "read_checkpoint", "write_checkpoint"]


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
