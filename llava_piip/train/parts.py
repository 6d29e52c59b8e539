"""The parts of the model: which parameters belong to each, and which of them are trained."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Any

from torch import nn

from ..loading import PARTS, part_parameters

__all__ = ["freeze_except", "parameter_groups", "trained_parts"]


def freeze_except(model: nn.Module, parts: Iterable[str]) -> None:
    """Makes the parameters of the named parts trainable, and no others.

    Raises:
        ConfigError: If there is no such part.
    """
    chosen = [parameter for part in parts for parameter in part_parameters(model, part).values()]
    model.requires_grad_(False)
    for parameter in chosen:
        parameter.requires_grad_(True)


def trained_parts(model: nn.Module) -> list[str]:
    """Parts with anything to train, in the order of `PARTS`."""
    return [part for part in PARTS if any(p.requires_grad for p in part_parameters(model, part).values())]


def parameter_groups(
    model: nn.Module, learning_rates: Mapping[str, float], weight_decay: float, decayed: Collection[str]
) -> list[dict[str, Any]]:
    """Groups for an optimizer: per part, with and without weight decay; frozen parameters are in none.

    Args:
        model: The model.
        learning_rates: Of each part.
        weight_decay: Of the parameters whose names are in `decayed`.
        decayed: As transformers' `Trainer.get_decay_parameter_names` gives them.

    Returns:
        Dicts with `params`, `lr`, `weight_decay`, and `part`, which optimizers carry along unread.
    """
    groups = []
    for part in PARTS:
        by_decay: dict[float, list[nn.Parameter]] = {}
        for name, parameter in part_parameters(model, part).items():
            if parameter.requires_grad:
                by_decay.setdefault(weight_decay if name in decayed else 0.0, []).append(parameter)
        groups += [
            {"params": params, "lr": learning_rates[part], "weight_decay": decay, "part": part}
            for decay, params in sorted(by_decay.items(), reverse=True)
        ]
    return groups
