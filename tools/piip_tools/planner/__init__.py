"""Plans pyramids for a budget: candidates with their cost, the paper's guidelines as rules, measurements, a figure."""

from .candidates import Budget, Candidate, candidates, nearest_published, parse_budget, parse_count
from .measuring import measure, search
from .proposals import RULES, Measured, Proposal, baseline_for, propose

__all__ = [
    "RULES",
    "Budget",
    "Candidate",
    "Measured",
    "Proposal",
    "baseline_for",
    "candidates",
    "measure",
    "nearest_published",
    "parse_budget",
    "parse_count",
    "propose",
    "search",
]
