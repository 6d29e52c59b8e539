"""The published benchmarks: questions, answers, scores, files to send in. `python -m llava_piip.eval --help`."""

from __future__ import annotations

from .benchmark import Answer, Benchmark, EvalError, Question, Score
from .multiple_choice import MMBENCH, SCIENCEQA, SEED
from .short_answers import GQA, MM_VET, POPE, TEXTVQA, TEXTVQA_WITHOUT_OCR, VQAV2

__all__ = ["BENCHMARKS", "VARIANTS", "Answer", "Benchmark", "EvalError", "Question", "Score", "find_benchmarks"]

_EIGHT = (MMBENCH, MM_VET, TEXTVQA, SCIENCEQA, GQA, VQAV2, SEED, POPE)
BENCHMARKS = {benchmark.name: benchmark for benchmark in _EIGHT}
"""By name, in the order of the published table."""
VARIANTS = {TEXTVQA_WITHOUT_OCR.name: TEXTVQA_WITHOUT_OCR}
"""Benchmarks by name that the table does not have: "all" leaves them out."""


def find_benchmarks(names: list[str]) -> list[Benchmark]:
    """Benchmarks by name, each once, or "all".

    Raises:
        EvalError: For an unknown name.
    """
    known = BENCHMARKS | VARIANTS
    if unknown := [name for name in names if name not in (*known, "all")]:
        raise EvalError(f"no benchmark is named {unknown[0]!r}: expected {', '.join(known)}, or all")
    if "all" in names:
        return list(BENCHMARKS.values())
    return [known[name] for name in dict.fromkeys(names)]
