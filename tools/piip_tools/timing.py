"""Clocks of the benchmarks."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

__all__ = ["Clock", "clock_for", "limited_threads", "now_for"]

Clock = Callable[[Callable[[], object]], float]
"""Seconds that a call takes."""


def clock_for(device: torch.device | str, threads: int) -> Clock:
    """What measures the seconds of a call: CPU time on one thread, wall time on more, between CUDA events on a GPU."""
    if torch.device(device).type == "cuda":
        return _cuda_seconds
    now = now_for(device, threads)

    def measure(call: Callable[[], object]) -> float:
        start = now()
        call()
        return now() - start

    return measure


def now_for(device: torch.device | str, threads: int) -> Callable[[], float]:
    """A clock: CPU time on one thread, wall time on more; a GPU is waited for at every reading."""
    if torch.device(device).type != "cuda":
        return time.process_time if threads == 1 else time.perf_counter

    def now() -> float:
        torch.cuda.synchronize(device)
        return time.perf_counter()

    return now


@contextmanager
def limited_threads(threads: int) -> Iterator[None]:
    """PyTorch computes on so many CPU threads inside."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _cuda_seconds(call: Callable[[], object]) -> float:
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    call()
    stop.record()
    torch.cuda.synchronize()
    return 1e-3 * start.elapsed_time(stop)
