from __future__ import annotations

import random

import pytest
from accelerate.data_loader import prepare_data_loader, skip_first_batches
from torch.utils.data import DataLoader

from llava_piip.data import DataError, ModalityLengthSampler
from piip_core.errors import ConfigError

BATCH, PER_STEP = 3, 4
STEP = BATCH * PER_STEP


def lengths(images: int, texts: int, seed: int = 0) -> list[int]:
    rng = random.Random(seed)
    values = [rng.randint(1, 500) for _ in range(images)] + [-rng.randint(1, 500) for _ in range(texts)]
    rng.shuffle(values)
    return values


def chunks(values, size):
    return [values[start : start + size] for start in range(0, len(values), size)]


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(("images", "texts"), [(100, 60), (48, 24), (13, 200)])
def test_only_the_end_mixes_modalities(images, texts, seed):
    values = lengths(images, texts, seed)
    order = list(ModalityLengthSampler(values, BATCH, PER_STEP, seed=seed))
    num_pure = (images - 1) // STEP + (texts - 1) // STEP  # the last step of each, full or not, goes to the end
    steps, rest = chunks(order[: num_pure * STEP], STEP), order[num_pure * STEP :]
    assert all(len({values[i] > 0 for i in step}) == 1 for step in steps)
    assert rest == sorted(rest)
    assert sum(values[i] > 0 for i in rest) == (images - 1) % STEP + 1
    if seed == 0 and images == 100:
        assert len({values[step[0]] > 0 for step in steps[:6]}) == 2  # steps of both kinds are shuffled


def test_epochs_and_seeds():
    values = lengths(100, 60)
    sampler, other = (ModalityLengthSampler(values, BATCH, PER_STEP, seed=3) for _ in range(2))
    first = list(sampler)
    assert list(sampler) == first == list(other)
    sampler.set_epoch(1)
    second = list(sampler)
    assert second != first
    sampler.set_epoch(0)
    assert list(sampler) == first
    assert list(ModalityLengthSampler(values, BATCH, PER_STEP, seed=4)) != first


def test_processes_share_each_step():
    """As the Trainer does it: two processes with two accumulation steps see every sample once, and the same steps."""
    values = lengths(96, 48)
    sampler = ModalityLengthSampler(values, BATCH, PER_STEP)
    orders = []
    for process in range(2):
        loader = DataLoader(range(len(values)), BATCH, sampler=sampler, collate_fn=list)
        shard = prepare_data_loader(loader, num_processes=2, process_index=process, put_on_device=False)
        shard.set_epoch(2)
        orders.append(list(shard))
        assert sampler.epoch == 2
        if process == 0:  # resuming in the middle of the epoch
            assert list(skip_first_batches(shard, 5)) == orders[0][5:]
    sampler.set_epoch(2)
    expected = [set(step) for step in chunks(list(sampler), STEP)]
    assert len(orders[0]) == len(orders[1]) == len(values) // BATCH // 2
    found = [
        {i for batches in orders for batch in batches[2 * n : 2 * n + 2] for i in batch} for n in range(len(expected))
    ]
    assert found == expected


def test_bad_input():
    with pytest.raises(DataError, match="sample 1 has length zero"):
        ModalityLengthSampler([3, 0, -2], 1, 1)
    with pytest.raises(DataError, match="no samples to draw from"):
        ModalityLengthSampler([], 1, 1)
    with pytest.raises(ConfigError, match="batch_size=0: expected at least 1"):
        ModalityLengthSampler([1], 0, 1)
    with pytest.raises(ConfigError, match="batches_per_step=-1"):
        ModalityLengthSampler([1], 1, -1)
