"""Parameter groups and learning-rate schedules of the published training."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from fvcore.common.param_scheduler import ParamScheduler
from omegaconf import OmegaConf
from torch import nn

from piip_core import PIIP
from piip_core.merging import BranchMerging, ClassificationHeads
from piip_core.pyramid import ParameterLayers


def iterations(epochs: float, images: int, batch_size: int) -> int:
    """Iterations of a number of epochs; as in timm, an epoch leaves out the images of a batch that is not full.

    A LazyConfig says `${piip.iterations:EPOCHS,IMAGES,BATCH_SIZE}`, each of them a number or an interpolation, and
    follows a change of any.
    """
    return max(math.floor(epochs * max(images // batch_size, 1)), 1)


OmegaConf.register_new_resolver("piip.iterations", iterations, replace=True)


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


class CosineToMinimum(ParamScheduler):
    """timm's `CosineLRScheduler` for Detectron2, iteration by iteration.

    The rate rises in a line from `warmup_lr`, then joins the cosine that started at the first iteration and ends at
    `min_lr`. Both are rates and no factors: they are the same for parameters whose base rate is another, as in timm.

    Args:
        max_iter (int): length of the training.
        warmup_iters (int): iterations until the rate is the base rate.
        warmup_lr (float): rate of the first iteration.
        min_lr (float): rate of the last one.
    """

    def __init__(self, max_iter: int, warmup_iters: int = 0, warmup_lr: float = 0.0, min_lr: float = 0.0) -> None:
        if not 0 <= warmup_iters <= max_iter:
            raise ValueError(
                f"warmup_iters={warmup_iters}: expected 0 to max_iter={max_iter}; a shorter training needs a smaller "
                "train.warmup_epochs"
            )
        self.warmup, self.warmup_lr, self.min_lr = warmup_iters / max_iter, warmup_lr, min_lr

    def __call__(self, where: float) -> float:
        """What a base rate has to be multiplied with at `where`, the part of the training that is done."""
        if where < self.warmup:
            return _Affine(where / self.warmup, self.warmup_lr)
        return _Affine(0.5 * (1.0 + math.cos(math.pi * where)), self.min_lr)


class _Affine(float):
    """A factor f whose product with a base rate r is f * r + (1 - f) * floor.

    Detectron2 multiplies the base rate of every group by what a scheduler returns, and nothing else.
    """

    def __new__(cls, factor: float, floor: float) -> _Affine:
        self = super().__new__(cls, factor)
        self.floor = floor
        return self

    def __mul__(self, rate: float) -> float:
        return float(self) * rate + (1.0 - float(self)) * self.floor

    __rmul__ = __mul__


def classifier_params(
    model: nn.Module,
    *,
    base_lr: float,
    weight_decay: float,
    interaction_lr_ratio: float = 1.0,
    head_lr_ratio: float = 1.0,
    decay_vectors: bool = True,
) -> list[dict[str, Any]]:
    """Optimizer groups of a classifier: branches with the heads that belong to their networks, and everything else.

    Args:
        model: Model with a `PIIP` inside.
        base_lr: Learning rate of the branches.
        weight_decay: Of everything that decays.
        interaction_lr_ratio: Rate of interactions, and of a head on merged branches, over `base_lr`.
        head_lr_ratio: Rate of the heads of the branches over `base_lr`. More than 1 for new classes.
        decay_vectors: Whether biases, norms, position embeddings and class tokens decay as well, as published for
            fine-tuning.

    Returns:
        Groups with the keys "params", "lr" and "weight_decay".
    """
    ratios: dict[nn.Parameter, float] = {}
    for module in model.modules():
        if isinstance(module, PIIP):
            ratios |= dict.fromkeys(module.branches.parameters(), 1.0)
        elif isinstance(module, ClassificationHeads):
            ratios |= dict.fromkeys(module.parameters(), head_lr_ratio)
    exempt = set() if decay_vectors else set(model.no_weight_decay())

    def settings(name: str, parameter: nn.Parameter) -> tuple[Any, dict[str, float]]:
        ratio = ratios.get(parameter, interaction_lr_ratio)
        decays = decay_vectors or (parameter.ndim > 1 and name not in exempt)
        return (ratio, decays), {"lr": base_lr * ratio, "weight_decay": weight_decay if decays else 0.0}

    return _groups(model, settings)


def _groups(
    model: nn.Module, settings: Callable[[str, nn.Parameter], tuple[Any, dict[str, float]]]
) -> list[dict[str, Any]]:
    """What is trained, in groups by the keys that `settings` gives; the first member decides the rest."""
    groups: dict[Any, dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            key, values = settings(name, parameter)
            groups.setdefault(key, {"params": [], **values})["params"].append(parameter)
    return [groups[key] for key in sorted(groups)]


def layer_decay_params(
    model: nn.Module, *, base_lr: float, weight_decay: float, decay_rate: float = 1.0
) -> list[dict[str, Any]]:
    """Optimizer groups as in the published training: deeper layers learn faster, heads and interactions fastest.

    `ParameterLayers` numbers the layers. The learning rate of one is `base_lr * decay_rate ** (last - layer)`. Vectors
    and biases do not decay; position embeddings and merging weights do, as published.

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
    layers, last = {}, 0
    for pyramid in pyramids:
        layer_of = ParameterLayers(pyramid)
        layers, last = {p: layer_of(name) for name, p in pyramid.named_parameters()}, layer_of.last
    merging_weights = {module.weights for module in model.modules() if isinstance(module, BranchMerging)}

    def settings(name: str, parameter: nn.Parameter) -> tuple[Any, dict[str, float]]:
        layer = layers.get(parameter, last)
        decays = parameter in merging_weights or (parameter.ndim != 1 and not name.endswith(".bias"))
        values = {"lr": base_lr * decay_rate ** (last - layer), "weight_decay": weight_decay if decays else 0.0}
        return (int(layer), decays), values | {"layer": int(layer)}

    return _groups(model, settings)
