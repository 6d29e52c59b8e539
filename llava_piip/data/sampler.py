"""Orders of samples in which every step sees similar lengths, and either images or none."""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Sequence

import torch
from torch import Generator
from torch.utils.data import Sampler

from piip_core.errors import check

from .records import DataError


class ModalityLengthSampler(Sampler[int]):
    """The order of the published second stage: steps of similar lengths, of images or of text alone.

    All samples are shuffled and cut into steps of `batch_size * batches_per_step`; those of a step are spread over
    its batches so that the batches are about equally long. It yields the order for all processes together, the
    same in each; the Trainer gives every process its batches of it.

    Args:
        lengths: Length of each sample, negative for text only (`ConversationDataset.modality_lengths`).
        batch_size: Samples of one process in one forward pass.
        batches_per_step: Batches that make one update: processes times gradient accumulation steps.
        seed: With the epoch, decides the order.
    """

    def __init__(self, lengths: Sequence[int], batch_size: int, batches_per_step: int, *, seed: int = 0) -> None:
        check(batch_size > 0, "batch_size", batch_size, "at least 1")
        check(batches_per_step > 0, "batches_per_step", batches_per_step, "at least 1")
        _check(lengths)
        self.lengths, self.batch_size, self.batches_per_step = lengths, batch_size, batches_per_step
        self.seed, self.epoch = seed, 0

    def set_epoch(self, epoch: int) -> None:
        """Chooses the order of another epoch; training loops call it before each."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        generator = Generator().manual_seed(self.seed + self.epoch)
        return iter(group_by_modality(self.lengths, self.batch_size, self.batches_per_step, generator))


def group_by_length(
    lengths: Sequence[int], batch_size: int, batches_per_step: int, generator: Generator | None = None
) -> list[int]:
    """Indices of all samples in steps of similar lengths, shuffled by a generator, or torch's own."""
    shuffled = torch.randperm(len(lengths), generator=generator).tolist()
    order = []
    for step in _chunks(shuffled, batch_size * batches_per_step):
        step.sort(key=lambda i: lengths[i], reverse=True)
        order += _spread(step, lengths, batches_per_step)
    return order


def group_by_modality(
    lengths: Sequence[int],
    batch_size: int,
    batches_per_step: int,
    generator: Generator | None = None,
    *,
    shuffle_generator: Generator | None = None,
) -> list[int]:
    """Indices of all samples in steps of similar lengths which are all positive or all negative.

    What fills no step, or just one, comes last: the last step of each kind, together and in the order of the samples.
    `generator` (torch's own if None) orders the steps, `shuffle_generator` (if None the same) shuffles the samples
    before they are cut into steps.
    """
    _check(lengths)
    kinds = [[i for i, length in enumerate(lengths) if (length > 0) == positive] for positive in (True, False)]
    if not all(kinds):  # one kind: nothing is left over to come last, and negative lengths sort by their sign
        return group_by_length(lengths, batch_size, batches_per_step, generator)

    step_size = batch_size * batches_per_step
    steps, rest = [], []
    for indices in kinds:
        inner = group_by_length(
            [abs(lengths[i]) for i in indices], batch_size, batches_per_step, shuffle_generator or generator
        )
        *whole, last = _chunks([indices[i] for i in inner], step_size)
        steps += whole
        rest += last
    order = torch.randperm(len(steps), generator=generator).tolist()
    return [index for step in order for index in steps[step]] + sorted(rest)


def _check(lengths: Sequence[int]) -> None:
    if not len(lengths):
        raise DataError("there are no samples to draw from: expected at least one length")
    empty = next((i for i, length in enumerate(lengths) if length == 0), None)
    if empty is not None:
        raise DataError(f"sample {empty} has length zero: expected its number of words, negative for text only")


def _chunks(indices: list[int], size: int) -> list[list[int]]:
    return [indices[start : start + size] for start in range(0, len(indices), size)]


def _spread(step: list[int], lengths: Sequence[int], num_batches: int) -> list[int]:
    """A step from long to short, batch after batch: each next sample joins the shortest batch with room."""
    if len(step) % num_batches:  # only the last step of all
        return [index for batch in range(num_batches) for index in step[batch::num_batches]]
    room = len(step) // num_batches
    batches: list[list[int]] = [[] for _ in range(num_batches)]
    open_batches = [(0, batch) for batch in range(num_batches)]  # a heap of (total length, batch)
    for index in step:
        total, batch = heapq.heappop(open_batches)
        batches[batch].append(index)
        if len(batches[batch]) < room:
            heapq.heappush(open_batches, (total + lengths[index], batch))
    return [index for batch in batches for index in batch]
