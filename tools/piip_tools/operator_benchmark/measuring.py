"""Timing the sides."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from piip_core.ops.functional import deform_attn_grid, ms_deform_attn
from piip_core.ops.reference import compute_dtype, grid_sampling

from ..timing import Clock, clock_for, limited_threads
from .cases import DTYPES, Case, given_inputs, grid_inputs
from .peers import Peer, load_peer, usual_formulation

__all__ = ["Timing", "run_benchmark"]

DIRECTIONS = ("forward", "backward")
COPIED_BYTES = 1 << 26  # more than a cache holds
PYTORCH = "PyTorch"


@dataclass(frozen=True, kw_only=True)
class Timing:
    """Median milliseconds of one direction of one case."""

    case: str
    form: str
    """"fused": from offsets and logits; "sampling": from locations and weights."""
    width: int
    dtype: str
    direction: str
    ours_ms: float
    """In turns with the others, which leave other things in the caches."""
    pytorch_ms: float
    peers_ms: Mapping[str, float] = field(default_factory=dict)
    """Of other implementations, by their names."""
    alone_ms: float
    """Ours over and over, as the copy is timed."""
    bytes_moved: int
    """What has to be read and written at least; see `Case.bytes_moved`."""
    copy_bytes_per_second: float
    """Read and written by a plain copy, measured beside."""

    @property
    def ratio(self) -> float:
        """How many times faster ours is than PyTorch's."""
        return self.pytorch_ms / self.ours_ms

    @property
    def copy_share(self) -> float:
        """Which part of the copy's speed ours reaches alone."""
        return 1e3 * self.bytes_moved / self.alone_ms / self.copy_bytes_per_second

    def to_dict(self) -> dict[str, Any]:
        """All fields and what follows from them, for JSON."""
        return {**asdict(self), "ratio": self.ratio, "copy_share": self.copy_share}


def run_benchmark(
    cases: Sequence[Case],
    dtypes: Sequence[str],
    *,
    device: str = "cpu",
    batch: int = 1,
    repeats: int = 15,
    threads: int = 1,
    fused: bool = True,
    peers: Sequence[str] = (),
    baseline_in_float32: bool = False,
) -> list[Timing]:
    """Times forward and backward of every case in every dtype, all sides taking turns in this process.

    The fused form starts for all sides from offsets and logits, so the others' softmax and locations are timed too. On
    one thread CPU time is taken, which other load on the machine disturbs least; on more threads wall time; on a GPU
    the time between CUDA events.

    Args:
        dtypes: names out of `DTYPES`, of values, offsets and logits.
        fused: False to time the sampling alone; so it is in any case where the queries are not a map.
        peers: names out of `PEERS`.
        baseline_in_float32: run the PyTorch side of 16-bit cases in float32, rather than in the dtype of the values, as
            the usual implementations do.

    Raises:
        UserError: for a peer that cannot be imported.
    """
    clock = clock_for(device, threads)
    others = {name: load_peer(name) for name in peers}
    with limited_threads(threads):
        timings = []
        work = [(case, dtype) for case in cases for dtype in dtypes]
        for case, name in tqdm(work, desc="benchmark", leave=False):
            copy = _copy_speed(device, clock)
            in_grid = fused and case.query_shape is not None
            inputs = (grid_inputs if in_grid else given_inputs)(case, DTYPES[name], device, batch)
            sides = _grid_sides if in_grid else _given_sides
            medians = _time_sides(sides(case, others, DTYPES[name], baseline_in_float32), inputs, repeats, clock)
            sizes = (inputs[0].element_size(), inputs[1].element_size())
            for direction in DIRECTIONS:
                alone, ours, pytorch, *rest = next(medians)
                timings.append(
                    Timing(
                        case=case.name,
                        form="fused" if in_grid else "sampling",
                        width=case.width,
                        dtype=name,
                        direction=direction,
                        ours_ms=ours,
                        pytorch_ms=pytorch,
                        peers_ms=dict(zip(others, rest, strict=True)),
                        alone_ms=alone,
                        bytes_moved=case.bytes_moved(direction, batch, *sizes),
                        copy_bytes_per_second=copy,
                    )
                )
        return timings


def _copy_speed(device: str, clock: Clock) -> float:
    """Bytes per second that a copy reads and writes."""
    source, target = (torch.zeros(COPIED_BYTES, dtype=torch.uint8, device=device) for _ in range(2))
    return 2 * COPIED_BYTES / statistics.median(clock(lambda: target.copy_(source)) for _ in range(7))


Side = Callable[..., Tensor]


def _grid_sides(case: Case, peers: Mapping[str, Peer], dtype: torch.dtype, in_float32: bool) -> list[Side]:
    """Ours, PyTorch's and the peers', as functions of value and sampling."""
    geometry = compute_dtype(dtype) if in_float32 else dtype

    def ours(value: Tensor, sampling: Tensor) -> Tensor:
        return deform_attn_grid(value, case.value_shapes, case.query_shape, sampling, case.points)

    def other(peer: Peer, dtype: torch.dtype) -> Side:
        def side(value: Tensor, sampling: Tensor) -> Tensor:
            value = value.to(dtype)
            where = grid_sampling(value, case.flat_shapes, case.query_shape, sampling, case.points, dtype=dtype)
            return peer(value, case.value_shapes, *where)

        return side

    return [ours, other(usual_formulation, geometry), *(other(peer, dtype) for peer in peers.values())]


def _given_sides(case: Case, peers: Mapping[str, Peer], dtype: torch.dtype, in_float32: bool) -> list[Side]:
    """The same as functions of value, locations and weights."""
    geometry = compute_dtype(dtype) if in_float32 else dtype

    def ours(value: Tensor, locations: Tensor, weights: Tensor) -> Tensor:
        return ms_deform_attn(value, case.value_shapes, locations, weights)

    def other(peer: Peer, dtype: torch.dtype) -> Side:
        return lambda value, *where: peer(value.to(dtype), case.value_shapes, *(x.to(dtype) for x in where))

    return [ours, other(usual_formulation, geometry), *(other(peer, dtype) for peer in peers.values())]


def _time_sides(sides: Sequence[Side], inputs: Sequence[Tensor], repeats: int, clock: Clock) -> Iterator[list[float]]:
    """Yields, forward and then backward, median milliseconds of the first side alone, and of all sides in turns."""
    forward = [torch.no_grad()(lambda side=side: side(*inputs)) for side in sides]
    yield _medians(forward, repeats, clock)
    backward = []
    for side in sides:
        leaves = [tensor.detach().clone().requires_grad_() for tensor in inputs]
        output = side(*leaves)

        def back(output: Tensor = output, leaves: list[Tensor] = leaves) -> object:
            return torch.autograd.grad(output, leaves, torch.ones_like(output), retain_graph=True)

        backward.append(back)
    yield _medians(backward, repeats, clock)


def _medians(calls: Sequence[Callable[[], object]], repeats: int, clock: Clock) -> list[float]:
    for call in calls:
        call()
    rounds = [[clock(call) for call in calls] for _ in range(repeats)]
    alone = [clock(calls[0]) for _ in range(repeats)]
    return [1e3 * statistics.median(column) for column in (alone, *zip(*rounds, strict=True))]
