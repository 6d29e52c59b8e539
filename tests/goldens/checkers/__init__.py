"""Numerical proof: golden cases of the public implementation against this one."""

from .check import Check, Comparison
from .golden import GoldenCase, GoldenError, find_cases
from .runner import VERIFIERS, CaseResult, Status, find_verifier, main, run_cases, summary_line

__all__ = [
    "VERIFIERS",
    "CaseResult",
    "Check",
    "Comparison",
    "GoldenCase",
    "GoldenError",
    "Status",
    "find_cases",
    "find_verifier",
    "main",
    "run_cases",
    "summary_line",
]
