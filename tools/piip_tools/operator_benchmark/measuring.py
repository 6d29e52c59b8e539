"""Times the implementations in turns, forward and backward."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from tqdm import tqdm

from piip_core.ops.functional import deform_attn_grid, ms_deform_attn
from piip_core.ops.reference import compute_dtype, grid_sampling

from ..reporting import draw_bars, format_table, new_figure
from ..timing import Clock, clock_for, limited_threads, take_turns, time_call
from .baselines import Attend, load_baseline, usual_formulation
from .cases import DTYPES, Case, make_inputs

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["draw_results", "format_results", "implementations", "measure_operator"]

DIRECTIONS = ("forward", "backward")
COPIED_BYTES = 1 << 26  # more than a cache holds


def measure_operator(
    cases: Sequence[Case],
    dtypes: Sequence[str],
    *,
    device: str = "cpu",
    batch: int = 1,
    repeats: int = 15,
    threads: int = 1,
    baselines: Sequence[str] = (),
    pytorch_in_float32: bool = False,
) -> list[dict[str, Any]]:
    """Times forward and backward of every case in every dtype, all implementations in turns in this process.

    Where the queries are a map, all start from offsets and logits, so that the others' softmax and locations are timed
    too ("fused"); otherwise from locations and weights ("sampling").

    Args:
        cases: The calls.
        dtypes: Names out of `DTYPES`, of values, offsets and logits.
        device: "cpu" or "cuda".
        batch: Images.
        repeats: The medians are over so many.
        threads: CPU threads.
        baselines: Names out of `BASELINES`, beside the usual formulation in PyTorch.
        pytorch_in_float32: Runs that one in float32 in 16-bit cases, too.

    Returns:
        A result per case, dtype and direction: median milliseconds of ours ("ours_ms"), PyTorch's and the baselines';
        "ratio" of PyTorch's to ours; "alone_ms" of ours over and over, as a copy is timed; "copy_share", the part of
        that copy's speed at which ours then moves "bytes_moved", the least that has to be read and written.

    Raises:
        UserError: For a baseline that cannot be imported.
    """
    clock = clock_for(device, threads)
    loaded = {name: load_baseline(name) for name in baselines}
    results = []
    with limited_threads(threads):
        for case, name in tqdm(list(itertools.product(cases, dtypes)), desc="cases", leave=False):
            dtype = DTYPES[name]
            copied = _copy_speed(device, clock)
            inputs = make_inputs(case, dtype, device, batch)
            calls = implementations(case, loaded, dtype, compute_dtype(dtype) if pytorch_in_float32 else dtype)
            sizes = inputs[0].element_size(), inputs[1].element_size()
            for direction, prepare in zip(DIRECTIONS, (_forward, _backward), strict=True):
                works = [prepare(call, inputs) for call in calls.values()]
                medians = dict(zip(calls, _median_ms(works, repeats, clock), strict=True))
                (alone,) = _median_ms(works[:1], repeats, clock)
                moved = case.bytes_moved(direction, batch, *sizes)
                results.append(
                    {
                        "case": case.name,
                        "form": "sampling" if case.query_shape is None else "fused",
                        "width": case.width,
                        "dtype": name,
                        "direction": direction,
                        **{f"{name}_ms": median for name, median in medians.items()},
                        "ratio": medians["pytorch"] / medians["ours"],
                        "alone_ms": alone,
                        "bytes_moved": moved,
                        "copy_bytes_per_second": copied,
                        "copy_share": 1e3 * moved / alone / copied,
                    }
                )
    return results


def implementations(
    case: Case, baselines: Mapping[str, Attend], dtype: torch.dtype, pytorch_dtype: torch.dtype
) -> dict[str, Callable[..., Tensor]]:
    """Ours, PyTorch's and the baselines', as functions of what `make_inputs` returns."""

    def ours(value: Tensor, *sampling: Tensor) -> Tensor:
        if case.query_shape is None:
            return ms_deform_attn(value, case.value_shapes, *sampling)
        return deform_attn_grid(value, case.value_shapes, case.query_shape, *sampling, case.points)

    def other(attend: Attend, dtype: torch.dtype) -> Callable[..., Tensor]:
        def call(value: Tensor, *sampling: Tensor) -> Tensor:
            value = value.to(dtype)
            if case.query_shape is None:
                where = [x.to(dtype) for x in sampling]
            else:
                where = grid_sampling(value, case.flat_shapes, case.query_shape, *sampling, case.points, dtype=dtype)
            return attend(value, case.value_shapes, *where)

        return call

    others = {name: other(attend, dtype) for name, attend in baselines.items()}
    return {"ours": ours, "pytorch": other(usual_formulation, pytorch_dtype), **others}


def format_results(results: Sequence[Mapping[str, Any]]) -> str:
    """The results as a table; "of copy" is the share of a copy's speed that ours reaches "alone", not in turns."""
    copied = statistics.median(result["copy_bytes_per_second"] for result in results)
    columns = {"case": "{case}", "form": "{form}", "D": "{width:d}", "dtype": "{dtype}", "direction": "{direction}"}
    columns |= {"ours ms": "{ours_ms:.3f}", "PyTorch ms": "{pytorch_ms:.3f}", "ratio": "{ratio:.1f}x"}
    columns |= {"alone ms": "{alone_ms:.3f}", "bytes": "{bytes_moved:,}", "of copy": "{copy_share:.0%}"}
    columns |= {f"{name} ms": f"{{{name}_ms:.3f}}" for name in _implementation_names(results)[2:]}
    return f"a copy reads and writes {1e-9 * copied:.1f} GB/s\n{format_table(results, columns)}"


def draw_results(results: Sequence[Mapping[str, Any]], title: str) -> Figure:
    """Speed relative to PyTorch as bars: axes for every dtype, and beside each other for the directions."""
    dtypes, cases = (list(dict.fromkeys(result[key] for result in results)) for key in ("dtype", "case"))
    names = [name for name in _implementation_names(results) if name != "pytorch"]
    figure = new_figure((12, 1.2 + len(dtypes) * (0.8 + 0.35 * len(cases) * max(1.0, 0.6 * len(names)))), title)
    for row, dtype in zip(figure.subplots(len(dtypes), 2, squeeze=False, sharey="row"), dtypes, strict=True):
        for axes, direction in zip(row, DIRECTIONS, strict=True):
            shown = [result for result in results if (result["dtype"], result["direction"]) == (dtype, direction)]
            speeds = {name: [result["pytorch_ms"] / result[f"{name}_ms"] for result in shown] for name in names}
            labels = {
                name: [
                    f"{speed:.1f}x ({result[f'{name}_ms']:.2f} ms"
                    + (f", {result['copy_share']:.0%} of copy)" if name == "ours" else ")")
                    for speed, result in zip(speeds[name], shown, strict=True)
                ]
                for name in names
            }
            shapes = [f"{result['case']}, D = {result['width']}" for result in shown]
            draw_bars(axes, shapes, speeds, labels=labels, xlabel=f"{direction}, {dtype}: times as fast as PyTorch")
            axes.axvline(1, color="0.5", linewidth=0.8)
    if len(names) > 1:
        figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside lower right", ncols=len(names))
    return figure


def _implementation_names(results: Sequence[Mapping[str, Any]]) -> list[str]:
    return [key.removesuffix("_ms") for key in results[0] if key.endswith("_ms") and key != "alone_ms"]


def _copy_speed(device: str, clock: Clock) -> float:
    """Bytes per second that a copy reads and writes."""
    source, target = (torch.zeros(COPIED_BYTES, dtype=torch.uint8, device=device) for _ in range(2))
    (milliseconds,) = _median_ms([lambda: target.copy_(source)], 7, clock)
    return 2e3 * COPIED_BYTES / milliseconds


def _forward(call: Callable[..., Tensor], inputs: Sequence[Tensor]) -> Callable[[], object]:
    return torch.no_grad()(lambda: call(*inputs))


def _backward(call: Callable[..., Tensor], inputs: Sequence[Tensor]) -> Callable[[], object]:
    leaves = [tensor.detach().clone().requires_grad_() for tensor in inputs]
    output = call(*leaves)
    return lambda: torch.autograd.grad(output, leaves, torch.ones_like(output), retain_graph=True)


def _median_ms(works: Sequence[Callable[[], object]], repeats: int, clock: Clock) -> list[float]:
    turns = take_turns([lambda work=work: time_call(work, clock) for work in works], repeats)
    return [1e3 * statistics.median(seconds) for seconds in turns]
