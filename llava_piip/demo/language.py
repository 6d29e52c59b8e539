"""The small language model of the demo: its tokenizer and its weights, made on the spot."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from piip_core.files import publish_folder

from ..conversation import encode_conversation, render_conversation
from ..data import Collator

Conversation = Sequence[Mapping[str, str]]

_CHAT_TEMPLATE = "vicuna_v1"
_VOCAB_SIZE = 600  # 256 bytes, and merges until every word of the demo is one token
_MAX_LENGTH = 512
_TOKENIZER_TEXTS = 3000
_LEARNING_RATE = 4e-3


def train_language_model(folder: Path, conversations: Sequence[Conversation], *, batch_size: int = 32) -> float:
    """Trains a tokenizer and a small Llama on conversations without images, and saves both in one folder.

    Each conversation is seen once. Returns the loss at the end, per token of the answers.
    """
    torch.manual_seed(0)
    tokenizer = _train_tokenizer(conversations[:_TOKENIZER_TEXTS])
    config = LlamaConfig(
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
    model = LlamaForCausalLM(config)
    batches = range(0, len(conversations) - batch_size + 1, batch_size)
    collator = Collator(tokenizer.pad_token_id)
    optimizer = torch.optim.AdamW(model.parameters(), _LEARNING_RATE, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, _LEARNING_RATE, total_steps=len(batches), pct_start=0.08)
    progress = tqdm(batches, desc="Language model", unit="batch")
    shown = math.log(len(tokenizer))
    for first in progress:
        loss = model(**collator([_encode(tokenizer, text) for text in conversations[first : first + batch_size]])).loss
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


def _train_tokenizer(conversations: Sequence[Conversation]) -> PreTrainedTokenizerBase:
    """Trains a byte-level BPE tokenizer, which can read any text, on conversations as the template writes them."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=_VOCAB_SIZE,
        special_tokens=["<unk>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = (render_conversation(messages, chat_template=_CHAT_TEMPLATE)[0] for messages in conversations)
    tokenizer.train_from_iterator((text.replace("</s>", "") for text in texts), trainer)
    special = dict(unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="<unk>")
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=_MAX_LENGTH, **special)


def _encode(tokenizer: PreTrainedTokenizerBase, messages: Conversation) -> dict[str, Tensor]:
    encoded = encode_conversation(
        tokenizer, messages, chat_template=_CHAT_TEMPLATE, image_token_id=-1, image_seq_length=0, has_images=False
    )
    return {"input_ids": torch.tensor(encoded.input_ids), "labels": torch.tensor(encoded.labels)}
