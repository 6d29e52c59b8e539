"""Clocks, turns and peak memory of the benchmarks."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import nn
from tqdm import tqdm

from .memory.dry_run import AliveStorages

__all__ = ["clock_for", "limited_threads", "peak_memory", "take_turns", "time_call"]

T = TypeVar("T")
Clock = Callable[[], float]


def clock_for(device: torch.device | str, threads: int) -> Clock:
    """A clock in seconds: CPU time on one thread, which other load on the machine disturbs least; wall time on more.

    A GPU is waited for at every reading.
    """
    if torch.device(device).type != "cuda":
        return time.process_time if threads == 1 else time.perf_counter

    def now() -> float:
        torch.cuda.synchronize(device)
        return time.perf_counter()

    return now


def time_call(call: Callable[[], object], clock: Clock) -> float:
    """Seconds that a call takes."""
    start = clock()
    call()
    return clock() - start


def take_turns(works: Sequence[Callable[[], T]], repeats: int) -> list[list[T]]:
    """What each work returns in each of `repeats` rounds, after one round that does not count."""
    rounds = tqdm(range(1 + repeats), desc="benchmark", leave=False)
    results = [[work() for work in works] for _ in rounds]
    return [list(column) for column in zip(*results[1:], strict=True)]


def peak_memory(call: Callable[[], object], model: nn.Module, device: torch.device | str) -> int:
    """The most bytes of tensors at one time that a call makes, so beside parameters, buffers and optimizer state.

    On a GPU as PyTorch's allocator counts them; on a CPU without what kernels allocate for themselves.
    """
    if torch.device(device).type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        held = torch.cuda.memory_allocated(device)
        call()
        return torch.cuda.max_memory_allocated(device) - held
    with AliveStorages(model) as tracker:
        call()
    return tracker.peak


@contextmanager
def limited_threads(threads: int) -> Iterator[None]:
    """PyTorch computes on so many CPU threads inside."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)
