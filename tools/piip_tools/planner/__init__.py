"""Plans pyramids for a budget: candidates with their cost, the paper's guidelines as rules, measurements, a picture."""

from .budget import Budget, parse_budget, parse_count
from .candidates import IMAGE_SIZES, Candidate, candidates, nearest_published, published_mask_rcnn
from .measuring import Machine, Measured, Search, measure, search
from .proposals import RULES, Proposal, Rule, baseline_for, propose, rank

__all__ = [
    "IMAGE_SIZES",
    "RULES",
    "Budget",
    "Candidate",
    "Machine",
    "Measured",
    "Proposal",
    "Rule",
    "Search",
    "baseline_for",
    "candidates",
    "measure",
    "nearest_published",
    "parse_budget",
    "parse_count",
    "propose",
    "published_mask_rcnn",
    "rank",
    "search",
]
