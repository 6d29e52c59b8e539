"""Median times and peak memory of several sides that take turns."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from piip_core.export import tensors_in

from ..memory import AliveStorages
from ..timing import Clock, clock_for, limited_threads
from .sides import Side

__all__ = ["PRECISIONS", "Measurement", "measure_inference", "measure_training"]

PRECISIONS = ("fp32", "bf16", "amp")
"""Float32; weights and images in bfloat16; float32 weights under bfloat16 autocast."""

Work = Callable[[], Any]


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """One side in one precision.

    Attributes:
        side: Title of the side.
        precision: Out of `PRECISIONS`.
        image_size: Side of the image.
        batch: Images.
        seconds: Of every round; the sides took turns.
        ratio: Median over the rounds of this side's time over that of the last side, the peer.
        peak: Most bytes of tensors at one time that work makes, so beside parameters, buffers and optimizer state.
        peak_ratio: `peak` over that of the peer.
    """

    side: str
    precision: str
    image_size: int
    batch: int
    seconds: tuple[float, ...]
    ratio: float
    peak: int
    peak_ratio: float

    @property
    def median(self) -> float:
        """Seconds."""
        return statistics.median(self.seconds)

    def to_dict(self) -> dict[str, Any]:
        """All fields and the median, for JSON."""
        return {**asdict(self), "median": self.median}


def measure_inference(
    sides: Sequence[Side],
    precisions: Sequence[str],
    *,
    device: str = "cpu",
    batch: int = 1,
    repeats: int = 5,
    threads: int = 1,
) -> list[Measurement]:
    """Forward passes without gradients; the last side is the peer of the others.

    On one CPU thread CPU time is taken, which other load on the machine disturbs least; on more threads wall time; on a
    GPU the time between CUDA events. Peak memory is what operators return as long as it lives (a GPU's own count
    there), without what kernels allocate for themselves.
    """

    def prepare(model: nn.Module, image: Tensor) -> Work:
        return torch.no_grad()(lambda: model(image))

    return _measure(sides, precisions, prepare, device, batch, repeats, threads)


def measure_training(
    sides: Sequence[Side],
    precisions: Sequence[str],
    *,
    device: str = "cpu",
    batch: int = 1,
    repeats: int = 3,
    threads: int = 1,
) -> list[Measurement]:
    """Training steps: forward, backward from given gradients of the outputs, AdamW; otherwise as `measure_inference`.

    Peak memory holds activations and gradients. There is no loss: its time would be that of the sizes of the maps.
    """

    def prepare(model: nn.Module, image: Tensor) -> Work:
        model.train()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6)

        def step() -> None:
            outputs = tensors_in(model(image))
            torch.autograd.backward(outputs, [torch.ones_like(output) for output in outputs])
            optimizer.step()
            optimizer.zero_grad()

        return step

    return _measure(sides, precisions, prepare, device, batch, repeats, threads)


def _measure(
    sides: Sequence[Side],
    precisions: Sequence[str],
    prepare: Callable[[nn.Module, Tensor], Work],
    device: str,
    batch: int,
    repeats: int,
    threads: int,
) -> list[Measurement]:
    found, rounds = [], len(precisions) * len(sides) * (repeats + 1)
    with limited_threads(threads), tqdm(total=rounds, desc="benchmark", leave=False) as progress:
        clock = clock_for(device, threads)
        for precision in precisions:
            found += _measure_precision(sides, precision, prepare, device, batch, repeats, clock, progress)
    return found


def _measure_precision(
    sides: Sequence[Side],
    precision: str,
    prepare: Callable[[nn.Module, Tensor], Work],
    device: str,
    batch: int,
    repeats: int,
    clock: Clock,
    progress: tqdm,
) -> list[Measurement]:
    works: list[Work] = []
    peaks: list[int] = []
    for side in sides:
        model, image = load(side, precision, device, batch)
        works.append(_within(side, model, prepare(model, image), precision, device))
        works[-1]()  # the first pass makes caches and the optimizer's state
        peaks.append(_peak(works[-1], model, device))
        progress.update()
    rounds = []
    for _ in range(repeats):
        rounds.append([])
        for work in works:
            rounds[-1].append(clock(work))
            progress.update()
    return [
        Measurement(
            side=side.title,
            precision=precision,
            image_size=side.image_size,
            batch=batch,
            seconds=tuple(times[i] for times in rounds),
            ratio=statistics.median(times[i] / times[-1] for times in rounds),
            peak=peaks[i],
            peak_ratio=peaks[i] / peaks[-1],
        )
        for i, side in enumerate(sides)
    ]


def load(side: Side, precision: str, device: str, batch: int) -> tuple[nn.Module, Tensor]:
    """The model of a side in evaluation mode, and images for it."""
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    torch.manual_seed(0)
    model = side.finish(side.build().eval().to(device, dtype))
    return model, torch.randn(batch, 3, side.image_size, side.image_size).to(device, dtype)


def _within(side: Side, model: nn.Module, work: Work, precision: str, device: str) -> Work:
    def run() -> None:
        with side.context(model), autocast_for(precision, device):
            work()

    return run


def autocast_for(precision: str, device: str) -> AbstractContextManager[None]:
    """Autocast for "amp"."""
    return torch.autocast(torch.device(device).type, torch.bfloat16) if precision == "amp" else nullcontext()


def _peak(work: Work, model: nn.Module, device: str) -> int:
    if torch.device(device).type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        held = torch.cuda.memory_allocated(device)
        work()
        return torch.cuda.max_memory_allocated(device) - held
    with AliveStorages(model) as tracker:
        work()
    return tracker.peak
