"""Results as a table."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from tabulate import tabulate

from .measuring import SideResult

__all__ = ["format_results"]

_Row = tuple[str, Callable[[SideResult], float | None], str]


def format_results(results: Sequence[SideResult]) -> str:
    """A line for each measure, with a column for each side and the ratio of the first to the second."""
    rows: list[_Row] = [
        ("visual tokens", lambda r: r.visual_tokens, "d"),
        ("prompt tokens", lambda r: r.first_token_s and r.prompt_tokens, "d"),
        ("vision parameters, M", lambda r: r.vision_parameters / 1e6, ".1f"),
        ("weights, MB", lambda r: r.weight_bytes / 1e6, ".0f"),
        ("memory beside the weights, MB", lambda r: r.working_bytes / 1e6, ".0f"),
        ("picture to pixel values, ms", lambda r: 1e3 * r.prepare_s, ".1f"),
        ("vision encoder, ms", lambda r: 1e3 * r.vision_s, ".1f"),
        ("first token, ms", lambda r: _milliseconds(r.first_token_s), ".1f"),
        ("vision encoder's share of it, %", lambda r: r.vision_share and 100 * r.vision_share, ".1f"),
        ("further tokens per second", lambda r: r.tokens_per_s, ".2f"),
        *(
            (f"second question, first token, {kept} kept, ms", _second(kept), ".1f")
            for kept in (results[0].second_s or ())
        ),
    ]
    table = []
    for title, read, digits in rows:
        values = [read(result) for result in results]
        if any(value is None for value in values):
            continue
        ratio = f"{values[0] / values[1]:.2f}" if len(values) > 1 and values[1] else ""
        table.append([title, *(format(value, digits) for value in values), ratio])
    headers = ["", *(result.name for result in results), "ratio"]
    return tabulate(
        table, headers, tablefmt="github", disable_numparse=True, colalign=("left", *["right"] * len(values), "right")
    )


def _milliseconds(seconds: float | None) -> float | None:
    return None if seconds is None else 1e3 * seconds


def _second(kept: str) -> Callable[[SideResult], float | None]:
    return lambda result: _milliseconds((result.second_s or {}).get(kept))
