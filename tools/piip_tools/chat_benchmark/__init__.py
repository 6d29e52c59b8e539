"""Times PIIP-LLaVA against LLaVA-1.5 around the same language model, both in one process."""

from .drawing import draw_results
from .measuring import SideResult, Workload, compare
from .report import format_results
from .sides import Side, load_pair, published_pair

__all__ = [
    "Side",
    "SideResult",
    "Workload",
    "compare",
    "draw_results",
    "format_results",
    "load_pair",
    "published_pair",
]
