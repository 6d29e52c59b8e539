"""A training loader whose every sample is a function of the seed and the iteration, so that runs resume exactly."""

from __future__ import annotations

import contextlib
import itertools
import logging
import random
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from detectron2.data import DatasetFromList
from detectron2.utils import comm
from torch.utils.data import DataLoader, Dataset, Sampler

from .dataset import DatasetError

logger = logging.getLogger(__name__)

_MAX_BAD_IN_A_ROW = 100


def derive_seed(*parts: int) -> int:
    """A well mixed 32-bit seed of several non-negative numbers, for example (seed, rank, iteration)."""
    return int(np.random.SeedSequence(parts).generate_state(1)[0])


@contextlib.contextmanager
def _fixed_random_state(seed: int) -> Iterator[None]:
    """Seeds Python's, NumPy's and torch's CPU generators inside, and puts their states back afterwards."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    random.seed(seed)
    np.random.seed(seed)
    torch.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])


class TrainBatchSampler(Sampler[list[tuple[int, int]]]):
    """Endless batches of (image index, sample seed) for this process.

    The image order is Detectron2's of `TrainingSampler` (endless shuffles dealt out over the processes). Batches are
    formed before any image is read, so the n-th batch depends on nothing but the arguments: number of images, batch
    size of this process, seed, group of every image (a batch holds images of one group), and how often an image comes
    in a row, over all processes, with other augmentations. Set `start` to the first batch wanted to resume.
    """

    def __init__(
        self, size: int, batch_size: int, seed: int, groups: np.ndarray | None = None, repeats: int = 1
    ) -> None:
        self.repeats = repeats
        self.size, self.batch_size, self.seed, self.start = size, batch_size, seed, 0
        self._groups = np.zeros(size, dtype=np.int64) if groups is None else groups

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for batch in itertools.islice(self._positions(), self.start, None):
            # Seeds only for batches that are used: skipping to a late iteration takes a second, not a minute.
            yield [(index, derive_seed(self.seed, position)) for index, position in batch]

    def _positions(self) -> Iterator[list[tuple[int, int]]]:
        rank, world_size = comm.get_rank(), comm.get_world_size()
        pending: dict[int, list[tuple[int, int]]] = defaultdict(list)
        groups = self._groups.tolist()
        for count, index in enumerate(itertools.islice(self._indices(), rank, None, world_size)):
            group = groups[index]
            pending[group].append((index, rank + count * world_size))
            if len(pending[group]) == self.batch_size:
                yield pending.pop(group)

    def _indices(self) -> Iterator[int]:
        """Endless shuffles of all processes together."""
        generator = torch.Generator().manual_seed(self.seed)
        while True:
            for index in torch.randperm(self.size, generator=generator).tolist():
                yield from itertools.repeat(index, self.repeats)


class _SeededDataset(Dataset):
    """Maps (image index, sample seed) to a sample; an unreadable image is replaced by a random other one."""

    def __init__(self, dicts: Any, mapper: Callable[[dict[str, Any]], dict[str, Any] | None]) -> None:
        self.dicts, self.mapper = dicts, mapper

    def __len__(self) -> int:
        return len(self.dicts)

    def __getitem__(self, key: tuple[int, int]) -> dict[str, Any]:
        index, seed = key
        bad = []
        with _fixed_random_state(seed):
            while len(bad) < _MAX_BAD_IN_A_ROW:
                record = self.dicts[index]
                sample = self.mapper(record)
                if sample is not None:
                    return {**sample, "bad_images": bad}
                bad.append(record["file_name"])
                index = np.random.randint(len(self.dicts))
        raise DatasetError(
            f"{len(bad)} images in a row cannot be read, the last one is {bad[-1]}: expected readable images"
        )


class TrainLoader:
    """Endless iterable of batches (lists of samples), made by `build_train_loader`.

    Attributes:
        dataset (Dataset): records as `dicts`, and at [index, seed] the sample that is made of one.
        batch_sampler (TrainBatchSampler): set its `start` to resume at an iteration.
        bad_images (set[str]): unreadable files met so far, with a mapper that skips them.
    """

    def __init__(self, loader: DataLoader) -> None:
        self._loader, self.dataset = loader, loader.dataset
        self.batch_sampler: TrainBatchSampler = loader.batch_sampler
        self.bad_images: set[str] = set()

    def __iter__(self) -> Iterator[list[dict[str, Any]]]:
        for batch in self._loader:
            for name in (name for sample in batch for name in sample.pop("bad_images")):
                if name not in self.bad_images:
                    self.bad_images.add(name)
                    count = len(self.bad_images)
                    if str(count).strip("0") == "1":  # 1, 10, 100 ... files: seen, without flooding the log
                        logger.warning("%d unreadable image files skipped so far, the last one is %s", count, name)
            yield batch


def build_train_loader(
    dataset: list[dict[str, Any]],
    *,
    mapper: Callable[[dict[str, Any]], dict[str, Any] | None],
    total_batch_size: int,
    aspect_ratio_grouping: bool = True,
    repeats: int = 1,
    num_workers: int = 0,
    seed: int = 0,
    **kwargs: Any,
) -> TrainLoader:
    """Like Detectron2's `build_detection_train_loader`, but reproducible and able to start at any iteration.

    Batch n and every random number of its augmentations depend on `seed`, n, the number of processes and the batch
    size only: not on the number of workers, and not on where training was interrupted.

    Args:
        dataset: Records in Detectron2's standard form, with "width" and "height".
        mapper: Makes a sample of a record; None stands for an unreadable image and is replaced by another one.
        total_batch_size: Images per iteration over all processes, a multiple of their number.
        aspect_ratio_grouping: Batches hold only wide (w > h) or only other images, so less is padded.
        repeats: How often an image comes in a row, each time augmented anew: repeated augmentation.
        num_workers: Loading processes; 0 loads in the training process.
        seed: Seed of order and augmentations; negative draws one, which `tools/lazyconfig_train_net.py` keeps.
        kwargs: Other arguments of `torch.utils.data.DataLoader`.
    """
    world_size = comm.get_world_size()
    if total_batch_size < 1 or total_batch_size % world_size:
        raise ValueError(
            f"total_batch_size={total_batch_size}: expected a positive multiple of the {world_size} processes"
        )
    if not len(dataset):
        raise DatasetError("the training set is empty: expected at least one image")
    if seed < 0:
        seed = comm.shared_random_seed()
    groups = None
    if aspect_ratio_grouping:
        groups = np.array([record["width"] > record["height"] for record in dataset], dtype=np.int64)
    sampler = TrainBatchSampler(len(dataset), total_batch_size // world_size, seed, groups, repeats)
    return TrainLoader(
        DataLoader(
            # One byte buffer that all workers share, as in Detectron2.
            _SeededDataset(DatasetFromList(dataset, copy=False), mapper),
            batch_sampler=sampler,
            num_workers=num_workers,
            collate_fn=list,  # samples stay as they are
            # Starting to iterate draws a number: from here, or the first iteration after a resume would differ
            generator=torch.Generator().manual_seed(seed),
            **kwargs,
        )
    )
