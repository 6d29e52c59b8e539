"""The benchmarks by name."""

from __future__ import annotations

import difflib

from .benchmark import Benchmark
from .files import EvalError
from .gqa import GQA
from .mmbench import MMBENCH, MMBENCH_CN, MMBENCH_TEST
from .mmvet import MM_VET
from .pope import POPE
from .scienceqa import SCIENCEQA
from .seed import SEED
from .textvqa import TEXTVQA
from .vqav2 import VQAV2

__all__ = ["BENCHMARKS", "EIGHT", "find_benchmark"]

EIGHT = (MMBENCH, MM_VET, TEXTVQA, SCIENCEQA, GQA, VQAV2, SEED, POPE)
"""The published ones, in the order of the published table."""

BENCHMARKS = {benchmark.name: benchmark for benchmark in (*EIGHT, MMBENCH_TEST, MMBENCH_CN)}


def find_benchmark(name: str) -> Benchmark:
    """A benchmark by name.

    Raises:
        EvalError: For an unknown name; the message lists the closest ones.
    """
    if name not in BENCHMARKS:
        close = difflib.get_close_matches(name, BENCHMARKS, cutoff=0.4) or BENCHMARKS
        raise EvalError(f"no benchmark is named {name!r}; close matches are {', '.join(close)}")
    return BENCHMARKS[name]
