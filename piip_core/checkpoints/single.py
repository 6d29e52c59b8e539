"""Reading one checkpoint file without running anybody's code."""

from __future__ import annotations

import json
import os
import pickle
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..errors import CheckpointError
from .lazy import LazyState, LazyTensor

__all__ = ["DESCRIPTION", "CheckpointFile", "listed", "load_torch_file", "read_single"]

# Where the known training programs put the weights inside their files
WRAPPERS = ("state_dict", "model", "module")
# Where the training of classifiers puts their moving average
EMA_WRAPPERS = ("model_ema", "state_dict_ema")
# Our own description inside converted files: a key of the dictionary, or of the safetensors header (as JSON)
DESCRIPTION = "piip"


@dataclass(frozen=True)
class CheckpointFile:
    """Weights of a checkpoint and what else it holds.

    Attributes:
        path: Where it was read from: a file, an index or a folder.
        state: The state dict, on the CPU, in the dtypes of the file; each tensor is read when it is asked for.
        wrapper: Path of the state dict inside the file, such as "model"; empty if the file is the state dict.
        extras: Names of other entries of the file, such as "optimizer".
        description: The description that `write_checkpoint` stored, or None.
    """

    path: Path
    state: LazyState
    wrapper: str = ""
    extras: tuple[str, ...] = ()
    description: dict[str, Any] | None = None


def load_torch_file(path: str | os.PathLike[str], *, unsafe_pickle: bool = False, mmap: bool = True) -> Any:
    """`torch.load` onto the CPU that runs no code, and says clearly what is wrong with a file.

    Args:
        path: The file.
        unsafe_pickle: If the file holds Python objects, load them all the same, which can run any code.
        mmap: Map the tensors of the file into memory instead of reading them, where its format allows.

    Raises:
        CheckpointError: If the file does not exist, is not complete or holds Python objects; the message names it.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file (looked from {os.getcwd()})")
    # The format before torch 1.6, not a zip archive, cannot be mapped
    load = partial(torch.load, path, map_location="cpu", mmap=mmap and zipfile.is_zipfile(path))
    try:
        try:
            return load(weights_only=True)
        except pickle.UnpicklingError as error:
            if not unsafe_pickle:
                raise CheckpointError(
                    f"{path}: holds more than tensors and plain values, and could run code when loaded "
                    f"({_first_line(error)}). If you trust where it comes from, pass unsafe_pickle=True "
                    "(--unsafe-pickle) once and save a .safetensors"
                ) from None
            return load(weights_only=False)
    except (AttributeError, ImportError) as error:
        raise CheckpointError(f"{path}: its Python objects need a package that is missing here ({error})") from None
    except (EOFError, RuntimeError, OSError, pickle.UnpicklingError) as error:
        raise _broken(path, error) from None
    except ValueError as error:
        if isinstance(error, CheckpointError):
            raise
        raise _broken(path, error) from None


def _broken(path: Path, error: Exception) -> CheckpointError:
    return CheckpointError(
        f"{path}: not a complete PyTorch checkpoint ({_first_line(error)}); truncated or another kind of file. "
        "Download it again"
    )


def listed(names: Sequence[str]) -> str:
    """The first names, and how many more there are."""
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def read_single(path: Path, unsafe_pickle: bool, *, ema: bool = False) -> CheckpointFile:
    """Reads a state dict from one PyTorch or .safetensors file.

    Raises:
        CheckpointError: If it cannot be read or holds no state dict, or with `ema` no moving average.
    """
    if path.suffix == ".safetensors":
        if ema:
            raise CheckpointError(f"{path}: a .safetensors has one set of weights, and no moving average (--ema)")
        return _read_safetensors(path)
    return _unwrap(path, load_torch_file(path, unsafe_pickle=unsafe_pickle), EMA_WRAPPERS if ema else WRAPPERS)


def _read_safetensors(path: Path) -> CheckpointFile:
    try:
        file = safe_open(path, framework="pt", device="cpu")
        # The file is mapped: this reads nothing but shapes and types
        tensors = {key: file.get_tensor(key) for key in file.keys()}
        metadata = file.metadata() or {}
        description = json.loads(metadata[DESCRIPTION]) if DESCRIPTION in metadata else None
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(
            f"{path}: not a readable safetensors file ({error}). Download or export it again"
        ) from None
    entries = {key: LazyTensor(t.shape, t.dtype, partial(file.get_tensor, key)) for key, t in tensors.items()}
    return CheckpointFile(path, LazyState(entries), description=description)


def _unwrap(path: Path, content: Any, wrappers: Sequence[str]) -> CheckpointFile:
    wrapper: list[str] = []
    extras: list[str] = []
    description = None
    while isinstance(content, Mapping) and not _is_state(content):
        inside = [key for key in wrappers if isinstance(content.get(key), Mapping)]
        if not inside:
            break
        description = content.get(DESCRIPTION, description)
        extras += [".".join([*wrapper, str(key)]) for key in content if key not in (inside[0], DESCRIPTION)]
        wrapper.append(inside[0])
        content = content[inside[0]]
    if not (isinstance(content, Mapping) and _is_state(content)):
        found = ", ".join(map(str, list(content)[:8])) if isinstance(content, Mapping) else type(content).__name__
        raise CheckpointError(
            f"{path}: no state dict inside (found {found}). Expected a dictionary of tensors, alone or under "
            + ", ".join(repr(key) for key in wrappers)
        )
    return CheckpointFile(path, LazyState.of(content), ".".join(wrapper), tuple(extras), description)


def _is_state(content: Mapping[Any, Any]) -> bool:
    return bool(content) and all(isinstance(k, str) and isinstance(v, Tensor) for k, v in content.items())
