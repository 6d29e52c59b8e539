"""The published benchmarks: questions, answers, scores, files to send in. `python -m llava_piip.eval --help`."""

from .benchmark import Answer, Benchmark, Question, Score
from .files import EvalError
from .registry import BENCHMARKS, EIGHT, find_benchmark

__all__ = ["BENCHMARKS", "EIGHT", "Answer", "Benchmark", "EvalError", "Question", "Score", "find_benchmark"]
