"""Times the deformable-attention operators against the same computation by others, side by side in one process."""

from .cases import CASES, DTYPES, Case
from .measuring import Timing, run_benchmark
from .peers import PEERS, find_peers
from .report import draw_timings, format_table, new_figure

__all__ = [
    "CASES",
    "DTYPES",
    "PEERS",
    "Case",
    "Timing",
    "draw_timings",
    "find_peers",
    "format_table",
    "new_figure",
    "run_benchmark",
]
