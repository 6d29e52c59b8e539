"""Times the deformable-attention operator against the same computation written in PyTorch (grid_sample)."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass

import torch
from torch import Tensor
from tqdm import tqdm

from .functional import ms_deform_attn
from .reference import compute_dtype, ms_deform_attn_reference

__all__ = ["CASES", "Case", "Timing", "format_table", "run_benchmark"]

DTYPES = {"fp64": torch.float64, "fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


@dataclass(frozen=True, kw_only=True)
class Case:
    """One call of the operator: `queries` positions read value maps of the sizes `spatial_shapes`."""

    name: str
    queries: int
    spatial_shapes: tuple[tuple[int, int], ...]
    width: int
    """Channels per head (D)."""
    heads: int = 16
    points: int = 4


# PIIP-TSB at 1568/1120/672 pixels (token maps 98, 70, 42 wide; T, S, B are the ViT sizes), a branch of 400 M and one
# of 6 B parameters, a ConvNeXt stage reading a CLIP map, and the shape the operator was invented for.
CASES = (
    Case(name="T98<-S70", queries=98 * 98, spatial_shapes=((70, 70),), width=6),
    Case(name="S70<-T98", queries=70 * 70, spatial_shapes=((98, 98),), width=12),
    Case(name="S70<-B42", queries=70 * 70, spatial_shapes=((42, 42),), width=12),
    Case(name="B42<-S70", queries=42 * 42, spatial_shapes=((70, 70),), width=24),
    Case(name="L28<-B42", queries=28 * 28, spatial_shapes=((42, 42),), width=32),
    Case(name="H6B 21<-B42", queries=21 * 21, spatial_shapes=((42, 42),), width=100),
    Case(name="ConvNeXt128<-CLIP24", queries=128 * 128, spatial_shapes=((24, 24),), width=8),
    Case(
        name="DETR encoder",
        queries=64 * 64 + 32 * 32 + 16 * 16 + 8 * 8,
        spatial_shapes=((64, 64), (32, 32), (16, 16), (8, 8)),
        width=32,
        heads=8,
    ),
)


@dataclass(frozen=True, kw_only=True)
class Timing:
    """Median milliseconds of one direction of one case, ours and PyTorch's."""

    case: str
    width: int
    dtype: str
    direction: str
    ours_ms: float
    pytorch_ms: float

    @property
    def ratio(self) -> float:
        """How many times faster ours is."""
        return self.pytorch_ms / self.ours_ms

    def to_dict(self) -> dict[str, str | int | float]:
        """All fields and the ratio, for JSON."""
        return {**asdict(self), "ratio": self.ratio}


def run_benchmark(
    cases: Sequence[Case],
    dtypes: Sequence[str],
    *,
    device: str = "cpu",
    batch: int = 1,
    repeats: int = 15,
    threads: int = 1,
    baseline_in_float32: bool = False,
) -> list[Timing]:
    """Times forward and backward of every case in every dtype, both sides alternating in this process.

    On one thread CPU time is taken, which other load on the machine disturbs least; on more threads wall time; on a
    GPU the time between CUDA events.

    Args:
        dtypes: names out of `DTYPES`, the dtype of the values.
        baseline_in_float32: run the PyTorch side of 16-bit cases in float32, as piip_core's own fallback does, rather
            than in the dtype of the values, as the usual implementations do.
    """
    clock = _cuda_milliseconds if torch.device(device).type == "cuda" else _cpu_milliseconds(threads)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        timings = []
        work = [(case, dtype) for case in cases for dtype in dtypes]
        for case, dtype in tqdm(work, desc="benchmark", leave=False):
            timings += _time_case(case, dtype, device, batch, repeats, clock, baseline_in_float32)
        return timings
    finally:
        torch.set_num_threads(before)


def format_table(timings: Sequence[Timing]) -> str:
    """The timings as a table of fixed-width columns."""
    lines = [f"{'case':<22}{'D':>5}{'dtype':>7}{'direction':>11}{'ours ms':>10}{'PyTorch ms':>12}{'ratio':>8}"]
    lines += [
        f"{t.case:<22}{t.width:>5}{t.dtype:>7}{t.direction:>11}{t.ours_ms:>10.3f}{t.pytorch_ms:>12.3f}{t.ratio:>7.1f}x"
        for t in timings
    ]
    return "\n".join(lines)


def _time_case(
    case: Case,
    dtype: str,
    device: str,
    batch: int,
    repeats: int,
    clock: Callable[[Callable[[], object]], float],
    baseline_in_float32: bool,
) -> Iterator[Timing]:
    value, locations, weights = _inputs(case, DTYPES[dtype], device, batch)
    flat = [size for shape in case.spatial_shapes for size in shape]
    geometry = compute_dtype(value.dtype) if baseline_in_float32 else value.dtype
    sides = []
    for function, inputs in (
        (lambda *x: ms_deform_attn(x[0], case.spatial_shapes, *x[1:]), (value, locations, weights)),
        (
            lambda *x: ms_deform_attn_reference(x[0], flat, *x[1:]),
            (value, locations.to(geometry), weights.to(geometry)),
        ),
    ):
        leaves = [tensor.detach().clone().requires_grad_() for tensor in inputs]
        output = function(*leaves)
        grad = torch.ones_like(output)
        forward = torch.no_grad()(lambda function=function, inputs=inputs: function(*inputs))

        def backward(output: Tensor = output, leaves: list[Tensor] = leaves, grad: Tensor = grad) -> object:
            return torch.autograd.grad(output, leaves, grad, retain_graph=True)

        sides.append((forward, backward))
    for direction, ours, pytorch in zip(("forward", "backward"), *sides, strict=True):
        ours(), pytorch()
        pairs = [(clock(ours), clock(pytorch)) for _ in range(repeats)]
        ours_ms, pytorch_ms = (statistics.median(column) for column in zip(*pairs, strict=True))
        yield Timing(
            case=case.name, width=case.width, dtype=dtype, direction=direction, ours_ms=ours_ms, pytorch_ms=pytorch_ms
        )


def _inputs(case: Case, dtype: torch.dtype, device: str, batch: int) -> tuple[Tensor, Tensor, Tensor]:
    """Random values; locations scattered a few pixels around the queries' own positions, as trained offsets are."""
    generator = torch.Generator().manual_seed(0)
    size, levels = sum(height * width for height, width in case.spatial_shapes), len(case.spatial_shapes)
    shape = (batch, case.queries, case.heads, levels, case.points)
    value = torch.randn(batch, size, case.heads, case.width, generator=generator)
    side = max(1, round(case.queries**0.5))
    index = torch.arange(case.queries)
    centres = torch.stack((index % side + 0.5, index // side + 0.5), dim=-1) / side
    sizes = torch.tensor([(width, height) for height, width in case.spatial_shapes])
    offsets = 2 * torch.randn(*shape, 2, generator=generator) / sizes[:, None]
    locations = centres[None, :, None, None, None] + offsets
    weights = torch.rand(shape, generator=generator).flatten(-2).softmax(-1).view(shape)
    geometry = compute_dtype(dtype)
    return value.to(device, dtype), locations.to(device, geometry), weights.to(device, geometry)


def _cpu_milliseconds(threads: int) -> Callable[[Callable[[], object]], float]:
    now = time.process_time if threads == 1 else time.perf_counter

    def measure(call: Callable[[], object]) -> float:
        start = now()
        call()
        return 1e3 * (now() - start)

    return measure


def _cuda_milliseconds(call: Callable[[], object]) -> float:
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    call()
    stop.record()
    torch.cuda.synchronize()
    return start.elapsed_time(stop)
