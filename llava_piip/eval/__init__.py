"""The published benchmarks: questions, answers, scores, files to send in. `python -m llava_piip.eval --help`."""

from __future__ import annotations

from .benchmark import Answer, Benchmark, EvalError, Question, Score
from .multiple_choice import MMBENCH, SCIENCEQA, SEED
from .short_answers import GQA, MM_VET, POPE, TEXTVQA, VQAV2

__all__ = ["BENCHMARKS", "Answer", "Benchmark", "EvalError", "Question", "Score", "find_benchmarks"]

_EIGHT = (MMBENCH, MM_VET, TEXTVQA, SCIENCEQA, GQA, VQAV2, SEED, POPE)
BENCHMARKS = {benchmark.name: benchmark for benchmark in _EIGHT}
"""By name, in the order of the published table."""


def find_benchmarks(names: list[str]) -> list[Benchmark]:
    """Benchmarks by name, each once, or "all".

    Raises:
        EvalError: For an unknown name.
    """
    if unknown := [name for name in names if name not in (*BENCHMARKS, "all")]:
        raise EvalError(f"no benchmark is named {unknown[0]!r}: expected {', '.join(BENCHMARKS)}, or all")
    if "all" in names:
        return list(BENCHMARKS.values())
    return [BENCHMARKS[name] for name in dict.fromkeys(names)]
