"""Weights of one part of a model out of a checkpoint of the whole."""

from __future__ import annotations

import os
from collections.abc import Collection, Sequence

from torch import nn

from ..errors import CheckpointError
from .files import read_checkpoint

__all__ = ["load_part", "part_prefixes"]


def part_prefixes(state: Collection[str], names: Sequence[str]) -> list[str]:
    """What the names of a state dict have before those of a part, for every complete set of it."""
    prefixes = [key.removesuffix(names[0]) for key in state if key == names[0] or key.endswith(f".{names[0]}")]
    return [prefix for prefix in prefixes if all(prefix + name in state for name in names)]


def load_part(module: nn.Module, path: str | os.PathLike[str]) -> None:
    """Loads a pyramid or backbone from a checkpoint of this project of whatever model around it.

    Raises:
        CheckpointError: If the file cannot be read, or does not hold exactly one set of all weights of the module.
    """
    state, names = read_checkpoint(path).state, list(module.state_dict())
    complete = part_prefixes(state, names)
    if len(complete) != 1:
        raise CheckpointError(
            f"{path}: holds {len(complete)} complete sets of the {len(names)} weights of this {type(module).__name__} "
            f"({names[0]} ...); expected one. Give the model the checkpoint was trained with; published files are "
            "converted by tools/convert_checkpoint.py"
        )
    try:
        module.load_state_dict({name: state[complete[0] + name] for name in names})
    except RuntimeError as error:
        raise CheckpointError(f"{path}: weights of another shape: {error}") from None
