"""Comparison of one case's tensors with their references, leaving none of them out."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor

from piip_core.errors import UserError

from .golden import GoldenCase

Result = TypeVar("Result")


@dataclass(frozen=True)
class Comparison:
    """One tensor against its reference.

    Attributes:
        name: Name of the reference tensor.
        error: Largest absolute difference over the reference's largest absolute value; for integers, flags and bits
            the share of entries that differ; for counts the difference over the sum.
        passed: Whether the difference is within the tolerance of the case.
        detail: What is wrong, or an explanation.
        refused: Whether ours refuses, as documented, what the public code takes.
    """

    name: str
    error: float
    passed: bool
    detail: str = ""
    refused: bool = False


@dataclass
class Check:
    """Collects the comparisons of a case; every recorded result has to come up."""

    case: GoldenCase
    comparisons: list[Comparison] = field(default_factory=list)

    def close(self, name: str, ours: Tensor, reference: Tensor | None = None, detail: str = "") -> None:
        """Compares floating-point values within the tolerance of the case.

        Args:
            name: Name of the reference tensor in the case.
            ours: Our result.
            reference: The reference if it is not the recorded tensor as it is (a part of it, another order).
            detail: Explanation of such a difference.
        """
        reference = self.case.tensors[name] if reference is None else reference
        if ours.shape != reference.shape:
            self._wrong_shape(name, ours, reference)
            return
        reference = reference.double()
        difference = torch.where(ours.double() == reference, 0.0, (ours.double() - reference).abs())  # inf == inf
        largest = difference.max().item() if difference.numel() else 0.0
        scale = reference[reference.isfinite()].abs().max().item() if reference.isfinite().any() else 0.0
        passed = largest <= self.case.atol * max(1.0, scale)  # False for nan
        self.comparisons.append(Comparison(name, largest / (scale or 1.0), passed, detail))

    def equal(self, name: str, ours: Tensor, reference: Tensor | None = None, *, allowed: float = 0.0) -> None:
        """Compares integers, flags or bits, of which at most the share `allowed` may differ."""
        reference = self.case.tensors[name] if reference is None else reference
        if ours.shape != reference.shape:
            self._wrong_shape(name, ours, reference)
            return
        share = (ours.to(reference.dtype) != reference).double().mean().item() if reference.numel() else 0.0
        detail = f"{share * reference.numel():.0f} of {reference.numel()} differ" if share else ""
        self.comparisons.append(Comparison(name, share, share <= allowed, detail))

    def counts(self, name: str, ours: Tensor, *, allowed: float) -> None:
        """Compares non-negative counts, such as mask areas, that may differ by `allowed` in total."""
        reference = self.case.tensors[name]
        if ours.shape != reference.shape:
            self._wrong_shape(name, ours, reference)
            return
        difference, total = (ours - reference).abs().sum().item(), reference.sum().item()
        self.comparisons.append(Comparison(name, difference / (total or 1), difference <= allowed))

    def same(self, name: str, ours: Any, recorded: Any, detail: str = "") -> None:
        """Compares values of any kind, and says where lists begin to differ."""
        passed = ours == recorded
        if not passed:
            detail = f"{detail} {_difference(ours, recorded)}".strip()
        self.comparisons.append(Comparison(name, 0.0 if passed else 1.0, passed, detail))

    def refuses(self, name: str, run: Callable[[], object], documented: str = "") -> None:
        """Passes if `run` refuses, with a `UserError`.

        Args:
            name: Name of the comparison.
            run: Gives our result.
            documented: Why ours refuses on purpose what the public code takes; empty where that stops as well.
        """
        try:
            result = run()
        except UserError as error:
            self._refused(name, error, documented, passed=True)
        else:
            self.comparisons.append(Comparison(name, math.inf, False, f"{result!r}, expected an error"))

    def attempt(self, name: str, run: Callable[[], Result], documented: str = "") -> Result | None:
        """What `run` returns; None where it refuses, with a `UserError`, what the public code takes.

        Args:
            name: Name of the comparison that tells of a refusal.
            run: Gives our result, which is not None.
            documented: Why ours refuses this input on purpose. Empty where it does not: a refusal then fails.
        """
        try:
            return run()
        except UserError as error:
            self._refused(name, error, documented, passed=bool(documented))
            return None

    def _refused(self, name: str, error: UserError, documented: str, *, passed: bool) -> None:
        detail = f"refused as documented ({documented}): {error}" if documented else f"refused: {error}"
        self.comparisons.append(Comparison(name, 0.0 if passed else math.inf, passed, detail, bool(documented)))

    def finish(self) -> Check:
        """Fails every recorded result that was not compared."""
        done = {comparison.name for comparison in self.comparisons}
        self.comparisons += [
            Comparison(name, math.inf, False, "not compared") for name in self.case.results if name not in done
        ]
        return self

    def _wrong_shape(self, name: str, ours: Tensor, reference: Tensor) -> None:
        detail = f"shape {tuple(ours.shape)}, expected {tuple(reference.shape)}"
        self.comparisons.append(Comparison(name, math.inf, False, detail))


def _difference(ours: Any, recorded: Any) -> str:
    if isinstance(ours, list) and isinstance(recorded, list):
        for number, (one, other) in enumerate(zip(ours, recorded, strict=False)):
            if one != other:
                return f"entry {number} is {one!r}, recorded {other!r}"
        return f"{len(ours)} entries, recorded {len(recorded)}"
    return f"is {ours!r}, recorded {recorded!r}"
