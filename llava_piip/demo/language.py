"""The small language model of the demo: its tokenizer and its weights, made on the spot."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from tqdm import tqdm
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from piip_core.files import publish_folder

from ..conversation import encode_conversation, render_conversation
from ..data import Collator

__all__ = ["train_language_model", "train_tokenizer"]

Conversation = Sequence[Mapping[str, str]]

_SPECIAL_TOKENS = ("<unk>", "<s>", "</s>")
_VOCAB_SIZE = 600  # 256 bytes, and merges until every word of the demo is one token
_MAX_LENGTH = 512
_TOKENIZER_TEXTS = 3000


def train_tokenizer(conversations: Sequence[Conversation], chat_template: str) -> PreTrainedTokenizerBase:
    """Trains a byte-level BPE tokenizer, which can read any text, on conversations as the template writes them."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=_VOCAB_SIZE,
        special_tokens=list(_SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = (render_conversation(messages, chat_template=chat_template)[0] for messages in conversations)
    tokenizer.train_from_iterator((text.replace("</s>", "") for text in texts), trainer)
    unknown, start, end = _SPECIAL_TOKENS
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token=unknown,
        bos_token=start,
        eos_token=end,
        pad_token=unknown,
        model_max_length=_MAX_LENGTH,
    )


def train_language_model(
    folder: Path,
    conversations: Sequence[Conversation],
    *,
    chat_template: str = "vicuna_v1",
    batch_size: int = 32,
    learning_rate: float = 4e-3,
    seed: int = 0,
) -> float:
    """Trains a tokenizer and a small Llama on conversations without pictures, and saves both in one folder.

    Args:
        folder: Written whole.
        conversations: {"role": ..., "content": ...} messages; the answers are learned. Each is seen once.
        chat_template: How conversations become text.
        batch_size: Conversations per update.
        learning_rate: Its highest value.
        seed: Of the weights.

    Returns:
        The loss at the end, per token of the answers.
    """
    torch.manual_seed(seed)
    tokenizer = train_tokenizer(conversations[:_TOKENIZER_TEXTS], chat_template)
    model = LlamaForCausalLM(_config(tokenizer))
    batches = range(0, len(conversations) - batch_size + 1, batch_size)
    collator = Collator.from_tokenizer(tokenizer)
    optimizer = torch.optim.AdamW(model.parameters(), learning_rate, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=len(batches), pct_start=0.08)
    progress = tqdm(batches, desc="Language model", unit="batch")
    shown = math.log(len(tokenizer))
    for first in progress:
        texts = conversations[first : first + batch_size]
        loss = model(**collator([_sample(tokenizer, text, chat_template) for text in texts])).loss
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        shown += 0.05 * (loss.item() - shown)
        progress.set_postfix(loss=f"{shown:.2f}", refresh=False)
    with publish_folder(folder, overwrite=True) as aside:
        model.save_pretrained(aside)
        tokenizer.save_pretrained(aside)
    return shown


def _config(tokenizer: PreTrainedTokenizerBase) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=96,
        intermediate_size=256,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=_MAX_LENGTH,
        initializer_range=0.08,  # about 1 / sqrt(hidden_size); the usual 0.02 is for wide models
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        tie_word_embeddings=False,
    )


def _sample(tokenizer: PreTrainedTokenizerBase, messages: Conversation, chat_template: str) -> dict[str, Tensor]:
    encoded = encode_conversation(
        tokenizer, messages, chat_template=chat_template, image_token_id=-1, image_seq_length=0, has_images=False
    )
    return {"input_ids": torch.tensor(encoded.input_ids), "labels": torch.tensor(encoded.labels)}
