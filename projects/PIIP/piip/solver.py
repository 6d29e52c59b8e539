"""Parameter groups with layer-wise learning-rate decay over the branches, and the warmup of the published schedules."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from fvcore.common.param_scheduler import ParamScheduler
from torch import nn

from piip_core import PIIP
from piip_core.branches import Branch

__all__ = ["WarmupFactor", "layer_decay_params"]


class WarmupFactor(ParamScheduler):
    """Multiplies another schedule by a factor that rises in a line to 1.

    Detectron2's `WarmupParamScheduler` goes in a line to the value at the end of the warmup instead: the same for a
    schedule that starts constant, up to 1 % less for the published one that falls from the first iteration on.

    Args:
        scheduler (ParamScheduler): the schedule without warmup.
        warmup_iters (int): iterations until the factor is 1.
        warmup_factor (float): factor of the first iteration.
        max_iter (int): length of the training.
    """

    def __init__(self, scheduler: ParamScheduler, warmup_iters: int, warmup_factor: float, max_iter: int) -> None:
        if not 0 <= warmup_iters <= max_iter:
            raise ValueError(f"warmup_iters={warmup_iters}: expected 0 to max_iter={max_iter}")
        self.scheduler, self.warmup_factor = scheduler, warmup_factor
        self.length = warmup_iters / max_iter

    def __call__(self, where: float) -> float:
        """The multiplier at `where`, the part of the training that is done."""
        value = self.scheduler(where)
        if where >= self.length:
            return value
        return value * (self.warmup_factor + (1.0 - self.warmup_factor) * where / self.length)


def layer_decay_params(
    model: nn.Module, *, base_lr: float, weight_decay: float, decay_rate: float = 1.0
) -> list[dict[str, Any]]:
    """Optimizer groups as in the published training: deeper layers learn faster, heads and interactions fastest.

    Let d be the number of blocks of the first branch that takes part, which ConvNeXt branches do not. There are d + 2
    layers: embeddings are layer 0, block l of that branch is layer l + 1, block l of a branch with d' blocks is layer
    (l + 1) * d / d' (rounded down), and everything else is the last layer. The learning rate of a layer is
    `base_lr * decay_rate ** (d + 1 - layer)`. Vectors and biases do not decay; position embeddings and the scalar
    merging weights do, as published.

    Two details of the published groups are kept: a fractional layer joins the group of its integer part, and the
    group takes the rate of its first member.

    Args:
        model: Model with at most one `PIIP` inside. Without one, all parameters get `base_lr`.
        base_lr: Learning rate of the last layer.
        weight_decay: Weight decay of matrices and everything else that decays.
        decay_rate: Factor per layer; 1 for no layer decay.

    Returns:
        Groups with the keys "params", "lr", "weight_decay" and "layer", embeddings first.

    Raises:
        ValueError: If the model holds more than one PIIP.
    """
    pyramids = [m for m in model.modules() if isinstance(m, PIIP)]
    if len(pyramids) > 1:
        raise ValueError(f"the model holds {len(pyramids)} PIIP modules: expected at most one to derive layers from")
    branches = _decaying_branches(pyramids[0]) if pyramids else []
    layers = dict(_branch_layers(branches))
    last = branches[0].num_blocks + 1 if branches else 0
    groups: dict[tuple[int, bool], dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        layer = layers.get(parameter, last)
        decays = parameter.ndim != 1 and not name.endswith(".bias")
        group = groups.setdefault(
            (int(layer), decays),
            {
                "params": [],
                "lr": base_lr * decay_rate ** (last - layer),
                "weight_decay": weight_decay if decays else 0.0,
                "layer": int(layer),
            },
        )
        group["params"].append(parameter)
    return [groups[key] for key in sorted(groups)]


def _decaying_branches(pyramid: PIIP) -> list[Branch]:
    return [b for b in pyramid.branches if any(b.layer_of(name) is not None for name, _ in b.named_parameters())]


def _branch_layers(branches: list[Branch]) -> Iterator[tuple[nn.Parameter, float]]:
    for branch in branches:
        for name, parameter in branch.named_parameters():
            layer = branch.layer_of(name)
            if layer is not None:
                yield parameter, layer * branches[0].num_blocks / branch.num_blocks
