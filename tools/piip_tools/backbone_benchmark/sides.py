"""What a benchmark compares."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace

import torch
from torch import nn

from piip_core import zoo
from piip_core.interaction import DeformableCrossAttention
from piip_core.prepared import prepare_for_inference
from piip_core.pyramid import DensePIIP

from .plain import plain_formulation

__all__ = ["FORMS", "Side", "piip_sides", "scatter"]

FORMS = ("ours", "plain", "prepared")
"""As it is built; in the straightforward formulation; after `prepare_for_inference`."""

_SCATTER = 2.0  # pixels: how far trained offsets spread around their reference points, roughly


@dataclass(frozen=True, kw_only=True)
class Side:
    """A backbone to measure.

    Args:
        name: Of the network.
        form: One out of `FORMS`, or "" for a network that is not of this project.
        build: Makes the model with random weights, in float32.
        image_size: Side of the square image it gets.
        finish: What follows when the model has its final dtype.
        context: Entered with the model around every measurement.
    """

    name: str
    form: str = ""
    build: Callable[[], nn.Module]
    image_size: int
    finish: Callable[[nn.Module], nn.Module] = lambda model: model
    context: Callable[[nn.Module], AbstractContextManager[None]] = lambda model: nullcontext()

    @property
    def title(self) -> str:
        """Name and form."""
        return f"{self.name} ({self.form})" if self.form else self.name


def piip_sides(
    names: Sequence[str],
    forms: Sequence[str] = FORMS,
    *,
    scale: float = 1.0,
    wrap: Callable[[zoo.ZooEntry], nn.Module] = lambda entry: DensePIIP(entry.config),
) -> list[Side]:
    """Backbones of published models.

    Args:
        names: Of the models, see `zoo.names`.
        forms: Out of `FORMS`.
        scale: Factor of all image sizes; sides of scaled images are cut to multiples of 32.
        wrap: Makes the model of a row of the published tables.
    """
    sides = []
    for entry in map(zoo.get, names):
        largest = max(branch.image_size for branch in entry.config.branches)
        ours = Side(
            name=entry.name,
            build=lambda entry=entry: scatter(wrap(entry)),
            image_size=int(largest * scale) // 32 * 32,
        )
        extra = {"ours": {}, "plain": {"context": plain_formulation}, "prepared": {"finish": prepare_for_inference}}
        sides += [replace(ours, form=form, **extra[form]) for form in forms]
    return sides


@torch.no_grad()
def scatter(model: nn.Module) -> nn.Module:
    """Makes deformable attention look around as it does when trained, at other places for every query.

    Fresh offsets are the same everywhere, which caches like better.
    """
    for module in model.modules():
        if isinstance(module, DeformableCrossAttention):
            linear = module.sampling_offsets
            linear.weight.normal_(std=_SCATTER / linear.in_features**0.5)  # its inputs are normalised
    return model
