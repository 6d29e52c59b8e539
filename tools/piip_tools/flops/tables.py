"""Reports as Markdown tables, which read well in a terminal too."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterable, Mapping

from tabulate import tabulate

from .classification import ClassificationRow
from .multimodal import MultimodalRow
from .report import ModelReport, ZooRow

__all__ = [
    "classification_table",
    "model_table",
    "multimodal_table",
    "published_tables",
    "replace_block",
    "zoo_table",
]

MISSING = "-"

# Column, and how many digits are printed
_SCORES = {"box_ap": ("box AP", 1), "mask_ap": ("mask AP", 1), "miou": ("mIoU", 2)}


def model_table(report: ModelReport) -> str:
    """One row per part of a model and their sum, in millions of parameters and thousand millions of MACs."""
    rows = [
        [
            row.name,
            _scaled(row.params, 1e6),
            _scaled(row.flops, 1e9),
            _scaled(row.params_published_count, 1e6),
            _scaled(row.flops_published_count, 1e9),
        ]
        for row in [*report.modules, report]
    ]
    rows[-1][0] = "total"
    height, width = report.input_size
    header = [
        "module",
        "params (M)",
        f"executed GMACs, {height} x {width}",
        "published count: params (M)",
        "published count: GMACs",
    ]
    return _table(header, rows)


def zoo_table(rows: Iterable[ZooRow]) -> str:
    """Our counts of published models beside the printed numbers, with the deviation of the published count."""
    header = [
        "model",
        "params (M)",
        "executed GMACs",
        "#Param count",
        "printed",
        "dev.",
        "#FLOPs count",
        "printed",
        "dev.",
    ]
    return _table(
        header,
        [
            [
                row.name,
                _scaled(row.params, 1e6),
                _scaled(row.flops, 1e9),
                _scaled(row.params_published_count, 1e6, "M"),
                _scaled(row.params_printed, 1e6, "M", digits=0),
                _percent(row.params_deviation),
                _scaled(row.flops_published_count, 1e9, "G"),
                _scaled(row.flops_printed, 1e9, "G", digits=0),
                _percent(row.flops_deviation),
            ]
            for row in rows
        ],
    )


def published_tables(rows: Iterable[ZooRow], link: Callable[[ZooRow], str]) -> str:
    """The published models for a README: a heading, a table and the notes of its rows for each published table.

    Args:
        rows: The models, those of a table one after the other.
        link: Gives the last cell, a link to the model's config.
    """
    parts = []
    for title, group in itertools.groupby(rows, key=lambda row: row.table):
        group = list(group)
        marks = _marks(row.note for row in group)
        parts += [f"### {title}", _published_table(group, link, marks)]
        parts += [_notes(marks)] if marks else []
    return "\n\n".join(parts)


def classification_table(rows: Iterable[ClassificationRow], link: Callable[[ClassificationRow], str]) -> str:
    """The published classifiers for a README: a table and the notes of its rows.

    Args:
        rows: The models.
        link: Gives the last cell, a link to the model's config.
    """
    rows = list(rows)
    marks = _marks(row.entry.note for row in rows)
    header = ["model", "resolution", "top-1", "#Param", "#FLOPs", "our #Param count", "our #FLOPs count"]
    header += ["our executed FLOPs", "name", "config"]
    table = _table(
        header,
        [
            [
                f"{row.entry.title} {marks.get(row.entry.note, '')}".strip(),
                row.entry.resolution,
                f"{row.entry.published.top1:.1f}",
                f"{row.entry.published.params_m:.0f}M",
                f"{row.entry.published.flops_g:.1f}G",
                _scaled(row.published_count.params, 1e6, "M"),
                _scaled(row.published_count.macs, 1e9, "G"),
                _scaled(row.executed.macs, 1e9, "G"),
                f"`{row.entry.name}`",
                link(row),
            ]
            for row in rows
        ],
    )
    return f"{table}\n\n{_notes(marks)}"


def multimodal_table(rows: Iterable[MultimodalRow]) -> str:
    """The published multimodal models for a README: a table and the notes of its rows."""
    rows = list(rows)
    marks = _marks(row.entry.note for row in rows)
    header = ["model", "resolution", "image tokens", "language model", "data"]
    header += ["MMBench", "MM-Vet", "TextVQA", "SQA-I", "GQA", "VQAv2", "SEED-I", "POPE", "average"]
    header += ["#FLOPs", "our #FLOPs count", "our executed FLOPs", "name"]
    table = _table(
        header,
        [
            [
                f"{row.entry.title} {marks.get(row.entry.note, '')}".strip(),
                row.entry.resolution,
                row.entry.image_seq_length,
                row.entry.language_model.rpartition("/")[2],
                row.entry.training_data,
                *(f"{score:.1f}" for score in dataclasses.astuple(row.entry.scores)),
                f"{row.entry.flops_g:.0f}G",
                _scaled(row.published_count.macs, 1e9, "G"),
                _scaled(row.executed.macs, 1e9, "G"),
                f"`{row.entry.name}`",
            ]
            for row in rows
        ],
    )
    return f"{table}\n\n{_notes(marks)}"


def _marks(notes: Iterable[str]) -> dict[str, str]:
    """A mark for each different note, in order."""
    return {note: f"[{number}]" for number, note in enumerate(dict.fromkeys(filter(None, notes)), 1)}


def _notes(marks: Mapping[str, str]) -> str:
    return "\n".join(f"{mark} {note}.  " for note, mark in marks.items())


def _published_table(rows: list[ZooRow], link: Callable[[ZooRow], str], marks: Mapping[str, str]) -> str:
    scores = [name for name in _SCORES if any(_score(row, name) != MISSING for row in rows)]
    header = [
        "model",
        "resolution",
        *(_SCORES[name][0] for name in scores),
        "#Param",
        "#FLOPs",
        "our #Param count",
        "our #FLOPs count",
        "our params",
        "our executed FLOPs",
        "config",
    ]
    return _table(
        header,
        [
            [
                f"{row.title} {marks.get(row.note, '')}".strip(),
                row.resolution,
                *(_score(row, name) for name in scores),
                _scaled(row.params_printed, 1e6, "M", digits=0),
                _scaled(row.flops_printed, 1e9, "G", digits=0),
                _scaled(row.params_published_count, 1e6, "M"),
                _scaled(row.flops_published_count, 1e9, "G"),
                _scaled(row.params, 1e6, "M"),
                _scaled(row.flops, 1e9, "G"),
                link(row),
            ]
            for row in rows
        ],
    )


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


def _table(header: list[str], rows: list[list[str]]) -> str:
    align = ["left"] + ["right"] * (len(header) - 1)
    return tabulate(rows, header, tablefmt="github", colalign=align, disable_numparse=True)


def _scaled(number: int | None, unit: float, suffix: str = "", *, digits: int = 1) -> str:
    return MISSING if number is None else f"{number / unit:.{digits}f}{suffix}"


def _percent(deviation: float | None) -> str:
    return MISSING if deviation is None else f"{deviation:+.2%}"


def _score(row: ZooRow, name: str) -> str:
    """A published score, with the paper's in brackets where it prints another."""
    repository, paper = getattr(row, name), getattr(row, f"{name}_paper")
    digits = _SCORES[name][1]
    texts = ["" if repository is None else f"{repository:.{digits}f}", "" if paper is None else f"({paper:.{digits}f})"]
    return " ".join(filter(None, texts)) or MISSING
