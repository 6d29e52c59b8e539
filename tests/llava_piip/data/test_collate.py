from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from llava_piip.conversation import IGNORE_INDEX
from llava_piip.data import Collator, DataError
from piip_core.errors import ConfigError

PAD = 7


def sample(ids, images=0, value=0.0):
    result = {"input_ids": torch.tensor(ids), "labels": torch.tensor([IGNORE_INDEX, *ids[1:]])}
    return result | ({"pixel_values": torch.full((images, 3, 2, 2), value)} if images else {})


def test_right_padding():
    batch = Collator(PAD)([sample([1, 2, 3], 1, 0.5), sample([4, 5]), sample([6], 2, 1.5)])
    assert batch["input_ids"].tolist() == [[1, 2, 3], [4, 5, PAD], [6, PAD, PAD]]
    assert batch["labels"].tolist() == [[-100, 2, 3], [-100, 5, -100], [-100, -100, -100]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 1, 0], [1, 0, 0]]
    assert batch["pixel_values"][:, 0, 0, 0].tolist() == [0.5, 1.5, 1.5]
    assert {key: value.dtype for key, value in batch.items()} == {
        "input_ids": torch.int64,
        "labels": torch.int64,
        "attention_mask": torch.int64,
        "pixel_values": torch.float32,
    }


def test_the_padding_id_inside_of_a_text_stays_visible():
    batch = Collator(PAD)([sample([1, PAD, 3, PAD]), sample([4])])
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1], [1, 0, 0, 0]]
    assert batch["labels"][0].tolist() == [-100, PAD, 3, PAD]


def test_text_alone_has_no_pixels():
    assert set(Collator(PAD)([sample([1]), sample([1, 2])])) == {"input_ids", "labels", "attention_mask"}


def test_the_tokenizers_padding():
    assert Collator.from_tokenizer(SimpleNamespace(pad_token_id=5)) == Collator(5)
    with pytest.raises(ConfigError, match="no padding token: set one"):
        Collator.from_tokenizer(SimpleNamespace(pad_token_id=None))


def test_bad_input():
    with pytest.raises(DataError, match="a batch of no samples"):
        Collator(0)([])
