"""Reading and writing checkpoint files without running anybody's code."""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..errors import CheckpointError
from ..files import atomic_path

__all__ = ["CheckpointFile", "read_checkpoint", "write_checkpoint"]

# Where the known training programs put the weights inside their files
WRAPPERS = ("state_dict", "model", "module")
# Our own description inside converted files: a key of the dictionary, or of the safetensors header (as JSON)
DESCRIPTION = "piip"


@dataclass(frozen=True)
class CheckpointFile:
    """Weights of a file and what else it holds.

    Attributes:
        path: Where it was read from.
        state: The state dict, on the CPU, in the dtypes of the file.
        wrapper: Path of the state dict inside the file, such as "model"; empty if the file is the state dict.
        extras: Names of other entries of the file, such as "optimizer".
        description: The description that `write_checkpoint` stored, or None.
    """

    path: Path
    state: dict[str, Tensor]
    wrapper: str = ""
    extras: tuple[str, ...] = ()
    description: dict[str, Any] | None = None


def read_checkpoint(path: str | os.PathLike[str], *, unsafe_pickle: bool = False) -> CheckpointFile:
    """Reads a state dict from a PyTorch file or a .safetensors file.

    Args:
        path: The file.
        unsafe_pickle: Allow Python objects in a PyTorch file. Reading such a file can run any code that its author
            put into it; never needed for a plain state dict.

    Raises:
        CheckpointError: If the file does not exist, cannot be read or holds no state dict; the message names it.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file. Give the path of a .pth or .safetensors checkpoint")
    if path.suffix == ".safetensors":
        return _read_safetensors(path)
    return _unwrap(path, _load(path, unsafe_pickle))


def _read_safetensors(path: Path) -> CheckpointFile:
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            state = {key: file.get_tensor(key) for key in file.keys()}
            metadata = file.metadata() or {}
    except SafetensorError as error:
        raise CheckpointError(
            f"{path}: not a readable safetensors file ({error}). Download or export it again"
        ) from None
    description = json.loads(metadata[DESCRIPTION]) if DESCRIPTION in metadata else None
    return CheckpointFile(path, _without_data_parallel(state), description=description)


def _load(path: Path, unsafe_pickle: bool) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=not unsafe_pickle)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path}: holds Python objects besides tensors, which are not loaded because they can run code "
            f"({_first_line(error)}). If you trust where it comes from, pass unsafe_pickle=True (--unsafe-pickle) once "
            "and save a .safetensors"
        ) from None
    except (EOFError, RuntimeError, ValueError) as error:
        raise CheckpointError(
            f"{path}: not a readable PyTorch file ({_first_line(error)}); truncated or "
            "not a checkpoint. Download it again"
        ) from None


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _unwrap(path: Path, content: Any) -> CheckpointFile:
    wrapper: list[str] = []
    extras: list[str] = []
    description = None
    while isinstance(content, Mapping) and not _is_state(content):
        inside = [key for key in WRAPPERS if isinstance(content.get(key), Mapping)]
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
            + ", ".join(repr(key) for key in WRAPPERS)
        )
    return CheckpointFile(path, _without_data_parallel(content), ".".join(wrapper), tuple(extras), description)


def _is_state(content: Mapping[Any, Any]) -> bool:
    return bool(content) and all(isinstance(k, str) and isinstance(v, Tensor) for k, v in content.items())


def _without_data_parallel(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    prefix = "module."
    wrapped = all(key.startswith(prefix) for key in state)
    return {key.removeprefix(prefix) if wrapped else key: value for key, value in state.items()}


def write_checkpoint(
    path: str | os.PathLike[str],
    state: Mapping[str, Tensor],
    *,
    wrapper: str = "model",
    description: Mapping[str, Any] | None = None,
) -> None:
    """Writes a state dict; an existing file is replaced only once the new one is complete.

    Args:
        path: Target; ".safetensors" for that format, anything else for a PyTorch file.
        state: The tensors.
        wrapper: Key of the state dict in a PyTorch file ("model" is what Detectron2 reads).
        description: Plain data to store beside the tensors.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    state = {key: value.detach().contiguous() for key, value in state.items()}
    with atomic_path(path) as aside:
        if path.suffix == ".safetensors":
            metadata = {"format": "pt"} | ({DESCRIPTION: json.dumps(description)} if description else {})
            save_file(state, aside, metadata=metadata)
        else:
            torch.save({wrapper: state} | ({DESCRIPTION: dict(description)} if description else {}), aside)
