"""The scalar functions whose gradients the cases record, by the text that describes them."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from piip_core.errors import NotSupportedYet

from .check import Check
from .golden import GoldenCase

# Spaces left out: one term or a sum of terms, each a sum or a mean over an output, and then remarks on the index i
_TERM = r"(?:(?P<factor>[\d.]+)\*)?(?P<kind>sum|mean)\(\w+\*cos\((?P<rate>[\d.]+)\*i\)\)"
_OVER_OUTPUTS = re.compile(rf"(?:sumoveroutputsof)?{_TERM}(?=$|,|with)")
_OF_EACH = re.compile(rf"{_TERM}(?:\+|$)")


def backpropagate(check: Check, outputs: Sequence[Tensor], prefix: str = "grad.") -> bool:
    """Whether the case records gradients; then they are computed, and the loss is compared if it is recorded."""
    if not any(name.startswith(prefix) for name in check.case.results):
        return False
    loss = recorded_loss(check.case, outputs)
    loss.backward()
    if "output.loss" in check.case.results:
        check.close("output.loss", loss.reshape(1))
    return True


def check_gradients(check: Check, gradients: Mapping[str, Tensor | None], prefix: str = "grad.") -> None:
    """Compares the recorded gradients with ours of the same names; `Check.finish` fails those that ours has not."""
    for name in check.case.results:
        gradient = gradients.get(name.removeprefix(prefix)) if name.startswith(prefix) else None
        if gradient is not None:
            check.close(name, gradient)


def recorded_loss(case: GoldenCase, outputs: Sequence[Tensor]) -> Tensor:
    """The scalar that the case differentiated: over all outputs, the sum or mean of every element times cos(rate * i),
    i its row-major index (no gradient can hide in a symmetry), times a factor.

    Raises:
        NotSupportedYet: For a description that is not known here.
    """
    text = case.info.get("loss")
    terms = _terms(re.sub(r"\s", "", str(text)), len(outputs))
    if terms is None:
        raise NotSupportedYet(f"loss {text!r}")
    return sum(_term(match, out) for match, out in zip(terms, outputs, strict=True))


def _terms(text: str, count: int) -> list[re.Match[str]] | None:
    """The term of each output; None if the text does not say that."""
    if found := _OVER_OUTPUTS.match(text):
        return [found] * count
    terms = list(_OF_EACH.finditer(text))
    complete = "".join(match.group() for match in terms) == text
    return terms if complete and len(terms) == count else None


def _term(match: re.Match[str], out: Tensor) -> Tensor:
    index = torch.arange(out.numel(), dtype=out.dtype, device=out.device)
    weighted = out.reshape(-1) * torch.cos(float(match["rate"]) * index)
    return float(match["factor"] or 1.0) * (weighted.mean() if match["kind"] == "mean" else weighted.sum())
