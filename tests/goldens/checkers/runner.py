"""Running golden cases and saying what came out."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from enum import Enum

from piip_core.errors import NotSupportedYet

from .check import Check, Comparison
from .golden import RESULTS, GoldenCase

__all__ = ["CaseResult", "Status", "Verifier", "run_cases", "summary_line"]

Verifier = Callable[[GoldenCase], Check]


class Status(Enum):
    PASSED = "passed"
    FAILED = "failed"
    NOT_SUPPORTED = "not supported yet"


@dataclass(frozen=True)
class CaseResult:
    """What came out of one case.

    Attributes:
        name: The case.
        status: The verdict.
        comparisons: Every tensor that was compared.
        reason: Why the case failed as a whole or is not supported.
    """

    name: str
    status: Status
    comparisons: tuple[Comparison, ...] = ()
    reason: str = ""

    def worst(self, kind: str) -> float | None:
        """Largest error among the results of one kind ("output", "inter" or "grad"), None without any."""
        return max((c.error for c in self.comparisons if c.name.split(".")[0] == kind), default=None)

    def __str__(self) -> str:
        errors = "  ".join(f"{kind} {self.worst(kind):.1e}" for kind in RESULTS if self.worst(kind) is not None)
        lines = [f"{self.name:<36} {self.status.value:<18} {errors or self.reason}"]
        if self.status is Status.FAILED:
            lines += [f"    {self.reason}"] if errors and self.reason else []
            lines += [f"    {c.name}: error {c.error:.3e} {c.detail}" for c in self.comparisons if not c.passed]
        lines += [f"    {c.name}: {c.detail}" for c in self.comparisons if c.refused]
        return "\n".join(lines)


def run_cases(cases: Iterable[GoldenCase], verifiers: Mapping[str, Verifier]) -> Iterator[CaseResult]:
    """Runs each case with the verifier of its family.

    An exception inside a case makes that case fail and no other; `NotSupportedYet` marks it as such.
    """
    for case in cases:
        try:
            yield _run(case, verifiers)
        except NotSupportedYet as error:
            yield CaseResult(case.name, Status.NOT_SUPPORTED, reason=error.feature)
        except Exception as error:  # whatever a broken case or model raises, the others still run
            where = traceback.extract_tb(error.__traceback__)[-1]
            reason = f"{type(error).__name__} at {where.filename}:{where.lineno}: {error}"
            yield CaseResult(case.name, Status.FAILED, reason=reason)


def _run(case: GoldenCase, verifiers: Mapping[str, Verifier]) -> CaseResult:
    if case.family not in verifiers:
        raise NotSupportedYet(f"family {case.family!r}")
    comparisons = tuple(verifiers[case.family](case).finish().comparisons)
    if not comparisons:
        return CaseResult(case.name, Status.FAILED, reason="nothing was compared")
    passed = all(comparison.passed for comparison in comparisons)
    return CaseResult(case.name, Status.PASSED if passed else Status.FAILED, comparisons)


def summary_line(results: Iterable[CaseResult]) -> str:
    """`N passed, M failed, K not supported yet`."""
    statuses = [result.status for result in results]
    return ", ".join(f"{statuses.count(status)} {status.value}" for status in Status)
