"""Reports as Markdown tables, which read well in a terminal too."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from operator import attrgetter
from typing import Any

from tabulate import tabulate

from .report import ModelReport
from .zoo_counts import ClassificationRow, MultimodalRow, ZooRow

__all__ = [
    "classification_table",
    "model_table",
    "multimodal_table",
    "published_tables",
    "replace_block",
    "zoo_table",
]

MISSING = "-"
_SCORES = {"box_ap": ("box AP", 1), "mask_ap": ("mask AP", 1), "miou": ("mIoU", 2)}  # column and digits
_BENCHMARKS = ("MMBench", "MM-Vet", "TextVQA", "SQA-I", "GQA", "VQAv2", "SEED-I", "POPE", "average")

Cell = Callable[[Any], object]


def model_table(report: ModelReport) -> str:
    """One line per part of a model and their sum, in millions of parameters and GMACs."""
    height, width = report.input_size
    columns = [
        ("module", attrgetter("name")),
        ("params (M)", _scaled("params", 1e6)),
        (f"executed GMACs, {height} x {width}", _scaled("flops", 1e9)),
        ("published count: params (M)", _scaled("params_published_count", 1e6)),
        ("published count: GMACs", _scaled("flops_published_count", 1e9)),
    ]
    return _table(columns, [*report.modules, dataclasses.replace(report, name="total")])


def zoo_table(rows: Iterable[ZooRow]) -> str:
    """Our counts of published models beside the printed numbers, with the deviation of the published count."""
    columns = [
        ("model", attrgetter("name")),
        ("params (M)", _scaled("params", 1e6)),
        ("executed GMACs", _scaled("flops", 1e9)),
        ("#Param count", _scaled("params_published_count", 1e6, "M")),
        ("printed", _scaled("params_printed", 1e6, "M", digits=0)),
        ("dev.", _percent("params_deviation")),
        ("#FLOPs count", _scaled("flops_published_count", 1e9, "G")),
        ("printed", _scaled("flops_printed", 1e9, "G", digits=0)),
        ("dev.", _percent("flops_deviation")),
    ]
    return _table(columns, rows)


def published_tables(rows: Iterable[ZooRow], link: Callable[[ZooRow], str]) -> str:
    """The published models for a README: a heading, a table and its notes for each published table.

    Args:
        rows: The models, those of a table one after the other.
        link: Gives the last cell, a link to the model's config.
    """
    parts = []
    for title, group in itertools.groupby(rows, key=lambda row: row.table):
        group = list(group)
        scores = [name for name in _SCORES if any(_score(name)(row) != MISSING for row in group)]
        columns = [
            ("model", attrgetter("title")),
            ("resolution", attrgetter("resolution")),
            *((_SCORES[name][0], _score(name)) for name in scores),
            ("#Param", _scaled("params_printed", 1e6, "M", digits=0)),
            ("#FLOPs", _scaled("flops_printed", 1e9, "G", digits=0)),
            ("our #Param count", _scaled("params_published_count", 1e6, "M")),
            ("our #FLOPs count", _scaled("flops_published_count", 1e9, "G")),
            ("our params", _scaled("params", 1e6, "M")),
            ("our executed FLOPs", _scaled("flops", 1e9, "G")),
            ("config", link),
        ]
        parts += [f"### {title}", _table_with_notes(columns, group, attrgetter("note"))]
    return "\n\n".join(parts)


def classification_table(rows: Iterable[ClassificationRow], link: Callable[[ClassificationRow], str]) -> str:
    """The published classifiers for a README: a table and its notes; `link` gives the last cell, as above."""
    columns = [
        ("model", attrgetter("entry.title")),
        ("resolution", attrgetter("entry.resolution")),
        ("top-1", _scaled("entry.published.top1")),
        ("#Param", _scaled("entry.published.params_m", suffix="M", digits=0)),
        ("#FLOPs", _scaled("entry.published.flops_g", suffix="G")),
        ("our #Param count", _scaled("published_count.params", 1e6, "M")),
        ("our #FLOPs count", _scaled("published_count.macs", 1e9, "G")),
        ("our executed FLOPs", _scaled("executed.macs", 1e9, "G")),
        ("name", lambda row: f"`{row.entry.name}`"),
        ("config", link),
    ]
    return _table_with_notes(columns, list(rows), attrgetter("entry.note"))


def multimodal_table(rows: Iterable[MultimodalRow]) -> str:
    """The published multimodal models for a README: a table and its notes."""
    columns = [
        ("model", attrgetter("entry.title")),
        ("resolution", attrgetter("entry.resolution")),
        ("image tokens", attrgetter("entry.image_seq_length")),
        ("language model", lambda row: row.entry.language_model.rpartition("/")[2]),
        ("data", attrgetter("entry.training_data")),
        *(
            (title, lambda row, index=index: f"{dataclasses.astuple(row.entry.scores)[index]:.1f}")
            for index, title in enumerate(_BENCHMARKS)
        ),
        ("#FLOPs", _scaled("entry.flops_g", suffix="G", digits=0)),
        ("our #FLOPs count", _scaled("published_count.macs", 1e9, "G")),
        ("our executed FLOPs", _scaled("executed.macs", 1e9, "G")),
        ("name", lambda row: f"`{row.entry.name}`"),
    ]
    return _table_with_notes(columns, list(rows), attrgetter("entry.note"))


def replace_block(text: str, name: str, content: str) -> str:
    """Replaces what stands between the lines `<!-- BEGIN name -->` and `<!-- END name -->`.

    Raises:
        ValueError: If the two lines are not there exactly once, in this order.
    """
    begin, end = f"<!-- BEGIN {name} -->\n", f"<!-- END {name} -->"
    if text.count(begin) != 1 or text.count(end) != 1 or text.index(begin) > text.index(end):
        raise ValueError(f"expected one line {begin.strip()!r} and after it one line {end!r}")
    before, _, rest = text.partition(begin)
    return f"{before}{begin}{content.strip()}\n{end}{rest.partition(end)[2]}"


def _table(columns: Sequence[tuple[str, Cell]], rows: Iterable[object]) -> str:
    cells = [[cell(row) for _, cell in columns] for row in rows]
    align = ["left"] + ["right"] * (len(columns) - 1)
    return tabulate(cells, [title for title, _ in columns], tablefmt="github", colalign=align, disable_numparse=True)


def _table_with_notes(columns: Sequence[tuple[str, Cell]], rows: Sequence[Any], note: Callable[[Any], str]) -> str:
    """A table with marks in the first column, and after it the notes that they stand for."""
    marks: Mapping[str, str] = {
        text: f"[{n}]" for n, text in enumerate(dict.fromkeys(filter(None, map(note, rows))), 1)
    }
    (title, name), *others = columns
    table = _table([(title, lambda row: f"{name(row)} {marks.get(note(row), '')}".strip()), *others], rows)
    return "\n\n".join([table, *(["\n".join(f"{mark} {text}.  " for text, mark in marks.items())] if marks else [])])


def _scaled(name: str, unit: float = 1, suffix: str = "", *, digits: int = 1) -> Cell:
    def cell(row: object) -> str:
        number = attrgetter(name)(row)
        return MISSING if number is None else f"{number / unit:.{digits}f}{suffix}"

    return cell


def _percent(name: str) -> Cell:
    return lambda row: MISSING if getattr(row, name) is None else f"{getattr(row, name):+.2%}"


def _score(name: str) -> Cell:
    """A published score, with the paper's in brackets where it prints another."""
    digits = _SCORES[name][1]

    def cell(row: ZooRow) -> str:
        repository, paper = getattr(row, name), getattr(row, f"{name}_paper")
        texts = [] if repository is None else [f"{repository:.{digits}f}"]
        texts += [] if paper is None else [f"({paper:.{digits}f})"]
        return " ".join(texts) or MISSING

    return cell
