"""What the audits of data sets have in common: reading many files at a time, and listing what is wrong."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from tqdm import tqdm

__all__ = ["Problem", "list_problems", "problems_as_dicts", "read_all"]

Problem = tuple[str, str, str]
"""Kind, path and message."""

_AHEAD = 10_000  # files queued at a time: each that waits takes a kilobyte

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")


def read_all(
    check: Callable[[_Item], _Result], items: Sequence[_Item], *, title: str, workers: int | None, progress: bool
) -> Iterator[_Result]:
    """Checks files in several threads, and gives the results in order.

    Args:
        check: What to do with one of them.
        items: The files.
        title: What to call them beside the progress bar.
        workers: Number of threads; None for one per core.
        progress: Show a progress bar.
    """
    bar = tqdm(total=len(items), desc=f"Reading {title}", unit="image", disable=None if progress else True)
    with ThreadPoolExecutor(workers or os.cpu_count()) as readers, bar:
        for start in range(0, len(items), _AHEAD):
            for result in readers.map(check, items[start : start + _AHEAD]):
                bar.update()
                yield result


def list_problems(title: str, problems: Sequence[Problem], examples: int) -> list[str]:
    """Lines with every kind of problem of a set, how often it occurs, and the first examples."""
    lines = []
    for kind, count in Counter(kind for kind, _, _ in problems).items():
        lines.append(f"\nPROBLEM in {title}: {kind}: {count}")
        lines += [f"  {message}" for other, _, message in problems if other == kind][:examples]
    return lines


def problems_as_dicts(problems: Sequence[Problem]) -> list[dict[str, Any]]:
    """For a report in JSON."""
    return [dict(zip(("kind", "path", "message"), problem, strict=True)) for problem in problems]
