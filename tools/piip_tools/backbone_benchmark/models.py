"""What the benchmark of backbones compares: this project's own, and what else is made a `TimedModel`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from piip_core import zoo
from piip_core.interaction import DeformableCrossAttention
from piip_core.prepared import prepare_for_inference
from piip_core.pyramid import DensePIIP

from .plain import plain_formulation

__all__ = ["FORMS", "TimedModel", "piip_models", "scatter_offsets"]

FORMS = {"ours": {}, "plain": {"context": plain_formulation}, "prepared": {"finish": prepare_for_inference}}
"""As it is built; in the straightforward formulation; after `prepare_for_inference`."""

_OFFSETS = 2.0  # pixels: how far trained offsets spread around their reference points, roughly


@dataclass(frozen=True, kw_only=True)
class TimedModel:
    """A backbone to measure.

    Args:
        name: What results call it.
        build: Makes it with random weights, in float32.
        image_size: Side of the square images it gets.
        finish: Called with the model when it has its final dtype.
        context: Entered with the model around every measurement.
    """

    name: str
    build: Callable[[], nn.Module]
    image_size: int
    finish: Callable[[nn.Module], nn.Module] = lambda model: model
    context: Callable[[nn.Module], AbstractContextManager[object]] = nullcontext

    def load(self, precision: str, device: str, batch: int) -> tuple[nn.Module, Tensor]:
        """The model in evaluation mode, and images for it."""
        dtype = torch.bfloat16 if precision == "bf16" else torch.float32
        torch.manual_seed(0)
        model = self.finish(self.build().eval().to(device, dtype))
        return model, torch.randn(batch, 3, self.image_size, self.image_size).to(device, dtype)


def piip_models(
    names: Sequence[str],
    forms: Sequence[str] = tuple(FORMS),
    *,
    scale: float = 1.0,
    build: Callable[[zoo.ZooEntry], nn.Module] = lambda entry: DensePIIP(entry.config),
) -> list[TimedModel]:
    """Backbones of published models.

    Args:
        names: Of the models, see `zoo.names`.
        forms: Out of `FORMS`.
        scale: Factor of all image sizes, which are cut to multiples of 32.
        build: Makes the model of an entry of the zoo.
    """
    return [
        TimedModel(
            name=f"{entry.name} ({form})",
            build=lambda entry=entry: scatter_offsets(build(entry)),
            image_size=int(max(branch.image_size for branch in entry.config.branches) * scale) // 32 * 32,
            **FORMS[form],
        )
        for entry in map(zoo.get, names)
        for form in forms
    ]


@torch.no_grad()
def scatter_offsets(model: nn.Module) -> nn.Module:
    """Makes deformable attention look around as it does when trained, at other places for every query.

    Fresh offsets are the same everywhere, which caches like better.
    """
    for module in model.modules():
        if isinstance(module, DeformableCrossAttention):
            linear = module.sampling_offsets
            linear.weight.normal_(std=_OFFSETS / linear.in_features**0.5)  # its inputs are normalised
    return model
