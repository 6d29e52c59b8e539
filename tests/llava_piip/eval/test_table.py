"""Published and measured scores side by side."""

import json
from dataclasses import astuple
from pathlib import Path

import pytest

from llava_piip.eval import BENCHMARKS, EvalError
from llava_piip.eval.__main__ import measured_scores, score_table
from piip_core import zoo

DOCS = Path(__file__).parents[3] / "docs" / "evaluation.md"


def cells(table, model):
    (line,) = (line for line in table.splitlines() if f" {model} " in line)
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_published_rows_are_those_of_the_zoo():
    lines = score_table().splitlines()[2:]
    entries = zoo.multimodal_entries()
    assert len(lines) == len(entries) + 1  # and an empty one for yours
    for entry, line in zip(entries, lines, strict=False):
        numbers = [float(cell) for cell in line.strip("|").split("|")[3:]]
        assert numbers == list(astuple(entry.scores))


def test_measured_row_and_its_mean(tmp_path):
    for number, benchmark in enumerate([*BENCHMARKS.values()][:-1]):
        folder = tmp_path / benchmark.name
        folder.mkdir()
        content = {"complete": benchmark.name != "gqa", "value": 50.0 + number}
        (folder / "scores.json").write_text(json.dumps(content))
    found = measured_scores(tmp_path)
    assert found["mmbench"] == 50 and "gqa" not in found  # a run that is not complete is no result
    row = cells(score_table({"mine": found}, [zoo.multimodal_entries()[0].name]), "**mine**")
    assert row[3] == "50.0" and row[-1] == ""
    row = cells(score_table({"mine": found | {"gqa": 10.0, "pope": 20.0}}), "**mine**")
    assert float(row[-1]) == pytest.approx((50 + 51 + 52 + 53 + 55 + 56 + 10 + 20) / 8, abs=0.06)
    with pytest.raises(EvalError, match="no scores"):
        measured_scores(tmp_path / "nothing")


def test_document_shows_the_table():
    """After a change of the zoo: `python -m llava_piip.eval table`, and its output into the document."""
    assert score_table() in DOCS.read_text(encoding="utf-8")
