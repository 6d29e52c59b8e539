"""The published benchmarks: questions, answers, scores, files to send in. `python -m llava_piip.eval --help`."""

from __future__ import annotations

import difflib

from .benchmark import Answer, Benchmark, Question, Score
from .files import EvalError
from .gqa import GQA
from .mmbench import MMBENCH, MMBENCH_CN, MMBENCH_TEST
from .pope import POPE
from .scienceqa import SCIENCEQA
from .seed import SEED
from .vqa import MM_VET, TEXTVQA, VQAV2

__all__ = ["BENCHMARKS", "EIGHT", "Answer", "Benchmark", "EvalError", "Question", "Score", "find_benchmarks"]

EIGHT = (MMBENCH, MM_VET, TEXTVQA, SCIENCEQA, GQA, VQAV2, SEED, POPE)
"""The published ones, in the order of the published table."""

BENCHMARKS = {benchmark.name: benchmark for benchmark in (*EIGHT, MMBENCH_TEST, MMBENCH_CN)}


def find_benchmarks(names: list[str]) -> list[Benchmark]:
    """Benchmarks by name, each once; "all" are the eight.

    Raises:
        EvalError: For an unknown name; the message lists the closest ones.
    """
    found = []
    for name in names:
        if name != "all" and name not in BENCHMARKS:
            close = difflib.get_close_matches(name, BENCHMARKS, cutoff=0.4) or BENCHMARKS
            raise EvalError(f"no benchmark is named {name!r}; close matches are {', '.join(close)}; or all")
        found += [BENCHMARKS[benchmark.name] for benchmark in EIGHT] if name == "all" else [BENCHMARKS[name]]
    return list(dict.fromkeys(found))
