"""Measured scores beside the published ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from tabulate import tabulate

from piip_core import zoo

from . import EIGHT
from .files import EvalError, read_json
from .runner import SCORES

__all__ = ["measured_scores", "score_table"]

_HEADER = ("model", "image", "language model", *(benchmark.title for benchmark in EIGHT), "mean")


def measured_scores(output: Path) -> dict[str, float]:
    """Scores in a folder of results, by benchmark; those that are scored elsewhere are not there.

    Raises:
        EvalError: If the folder has no scores.
    """
    found = {}
    for benchmark in EIGHT:
        path = output / benchmark.name / SCORES
        if path.exists():
            content = read_json(path)
            if content.get("complete") and content.get("value") is not None:
                found[benchmark.name] = content["value"]
    if not found:
        raise EvalError(f"{output}: has no scores of complete runs; expected BENCHMARK/{SCORES} below it")
    return found


def score_table(measured: Mapping[str, Mapping[str, float]] | None = None, rows: Sequence[str] | None = None) -> str:
    """The published rows (those named, or all of `piip_core.zoo.multimodal_entries()`), and those of measured models.

    Raises:
        ConfigError: For an unknown name.
    """
    entries = zoo.multimodal_entries() if rows is None else [zoo.multimodal(name) for name in rows]
    lines = []
    for entry in entries:
        scores = [getattr(entry.scores, benchmark.score_field) for benchmark in EIGHT]
        model = (entry.title, entry.resolution, entry.language_model.rpartition("/")[2])
        lines.append([*model, *map(_printed, (*scores, entry.scores.average))])
    for name, values in (measured or {"yours": {}}).items():
        scores = [values.get(benchmark.name) for benchmark in EIGHT]
        mean = None if None in scores else sum(scores) / len(scores)
        lines.append([f"**{name}**", "", "", *map(_printed, (*scores, mean))])
    return tabulate(lines, _HEADER, "github", disable_numparse=True)


def _printed(score: float | None) -> str:
    return "" if score is None else f"{score:.1f}"
