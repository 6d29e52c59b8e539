"""Batches out of samples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from piip_core.errors import ConfigError

from ..conversation import IGNORE_INDEX
from .problems import DataError

__all__ = ["Collator"]


@dataclass(frozen=True)
class Collator:
    """Pads samples on the right to the longest of them and puts their images one after the other.

    A batch has `input_ids` and `labels` (B, N) int64, `attention_mask` (B, N) int64, and `pixel_values`
    (images of the whole batch, 3, S, S) in the order of the samples, if there are images at all: text-only samples
    contribute none. The mask comes from the lengths, so an id that happens to be that of the padding stays visible
    inside of a text.

    Attributes:
        pad_token_id: Id of the padding; labels there are -100.
    """

    pad_token_id: int

    @classmethod
    def from_tokenizer(cls, tokenizer: Any) -> Collator:
        """A collator that pads with the tokenizer's padding id.

        Raises:
            ConfigError: If the tokenizer has none.
        """
        if tokenizer.pad_token_id is None:
            raise ConfigError(
                "the tokenizer has no padding token: set one, tokenizer.pad_token = tokenizer.unk_token "
                "(Llama, Vicuna) or tokenizer.eos_token; padding is masked, so any will do"
            )
        return cls(tokenizer.pad_token_id)

    def __call__(self, samples: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
        """Makes a batch of items of `ConversationDataset`.

        Raises:
            DataError: If there are no samples.
        """
        if not samples:
            raise DataError("a batch of no samples: expected at least one")
        ids = [sample["input_ids"] for sample in samples]
        batch = {
            "input_ids": pad_sequence(ids, batch_first=True, padding_value=self.pad_token_id),
            "labels": pad_sequence([sample["labels"] for sample in samples], True, IGNORE_INDEX),
            "attention_mask": pad_sequence([torch.ones_like(row) for row in ids], batch_first=True),
        }
        images = [sample["pixel_values"] for sample in samples if "pixel_values" in sample]
        return batch | {"pixel_values": torch.cat(images)} if images else batch
