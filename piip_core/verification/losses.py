"""The scalar functions whose gradients the cases record, by the text that describes them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..errors import NotSupportedYet
from .golden import GoldenCase

__all__ = ["recorded_loss"]


def _weighted(out: Tensor) -> Tensor:
    """Every element times cos(0.37 i), i its row-major index: no gradient can hide in a symmetry."""
    index = torch.arange(out.numel(), dtype=out.dtype, device=out.device)
    return out.reshape(-1) * torch.cos(0.37 * index)


def _sum(outputs: Sequence[Tensor]) -> Tensor:
    return sum(_weighted(out).sum() for out in outputs)


def _mean(outputs: Sequence[Tensor]) -> Tensor:
    return sum(10.0 * _weighted(out).mean() for out in outputs)


_LOSSES: dict[str, Callable[[Sequence[Tensor]], Tensor]] = {
    "sum(out * cos(0.37*i)), i row-major flat index": _sum,
    "sum(x1_out*cos(0.37*i)) + sum(x2_out*cos(0.37*i))": _sum,
    "sum over outputs of 10*mean(out * cos(0.37*i)) with i the row-major flat index of that output": _mean,
    "sum over outputs of 10*mean(out*cos(0.37*i)), i row-major flat index of that output": _mean,
}


def recorded_loss(case: GoldenCase, outputs: Sequence[Tensor]) -> Tensor:
    """The scalar that the case differentiated.

    Raises:
        NotSupportedYet: For a description that is not known here.
    """
    text = case.info.get("loss")
    if text not in _LOSSES:
        raise NotSupportedYet(f"loss {text!r}")
    return _LOSSES[text](outputs)
