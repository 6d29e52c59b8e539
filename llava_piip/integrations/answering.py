"""What harnesses ask of a model: answers to conversations, and how probable given answers are; in batches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import BatchFeature

from piip_core.errors import UserError

from ..conversation import IGNORE_INDEX, IMAGE_TAG, Messages
from ..data.dataset import Collator
from ..inference import ChatModel, ContextLengthError, MemoryLimitError


class Conversation(NamedTuple):
    """Messages with images among their parts, or as `<image>` in strings; and the images of all of them, in order."""

    messages: Messages
    images: Sequence[Any]


class Likelihood(NamedTuple):
    """How probable an answer with its end token is."""

    log_probability: float  # of the whole answer, natural logarithm
    num_tokens: int
    is_greedy: bool  # whether each token is the most probable one


def parts_message(role: str, parts: Sequence[str | None]) -> dict[str, Any]:
    """A message of texts in order; None is an image."""
    content = [{"type": "image"} if part is None else {"type": "text", "text": part} for part in parts]
    return {"role": role, "content": content}


def answer_batch(model: ChatModel, conversations: Sequence[Conversation], **settings: Any) -> list[str]:
    """Answers the last messages of conversations, all at once; each answer is what it would be alone.

    The settings are those of `answer_inputs`.

    Raises:
        UserError: If placeholders and images do not match, the template does not take the messages, or as
            `answer_inputs`.
    """
    prompts = [model.prompt(conversation.messages) for conversation in conversations]
    inputs = model.processor(text=prompts, images=[list(conversation.images) for conversation in conversations])
    return answer_inputs(model, inputs, **settings)


def answer_inputs(
    model: ChatModel,
    inputs: BatchFeature,
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_p: float = 1.0,
    until: Sequence[str] = (),
    **others: Any,
) -> list[str]:
    """Answers what the processor made of prompts and images.

    Args:
        model: Answers.
        inputs: With `input_ids`, `attention_mask` and, if there are images, `pixel_values`.
        max_new_tokens: Most tokens of an answer, as far as the model's context has room for them.
        temperature: 0 takes the most probable token each time.
        top_p: Sample among the most probable tokens that together have this probability.
        until: Texts that end an answer and are no part of it.
        **others: More settings of transformers' `GenerationConfig`, such as `num_beams`.

    Raises:
        ContextLengthError: If a conversation leaves no room for an answer.
        MemoryLimitError: If memory is too small.
        UserError: For a setting that is unknown or cannot work.
    """
    lengths = inputs["attention_mask"].sum(1).tolist()
    limits = [min(max_new_tokens, model.context_length - length) for length in lengths]
    if min(limits) < 1:
        raise _too_long(model, max(lengths))
    config = model.generation_config(
        max_new_tokens=max(limits), temperature=temperature, top_p=top_p if temperature else 1.0
    )
    if unknown := config.update(**others):
        raise UserError(f"{', '.join(unknown)}: no setting of transformers' GenerationConfig")
    return model.generate(inputs, config, stop=until, limits=limits)


def likelihood_batch(model: ChatModel, conversations: Sequence[Conversation]) -> list[Likelihood]:
    """How probable the answers are that conversations end with, all at once.

    Tokens are those of the training: the text after the role, with the end token of the template.

    Raises:
        ContextLengthError: If a conversation is longer than the context.
        UserError: If placeholders and images do not match, or an answer is empty.
    """
    batch = Collator.from_tokenizer(model.processor.tokenizer)([_encoded(model, each) for each in conversations])
    batch = {name: tensor.to(model.device) for name, tensor in batch.items()}
    targets = batch.pop("labels")[:, 1:]
    columns = (targets != IGNORE_INDEX).any(0).nonzero()[:, 0]  # the only ones whose logits are needed
    try:
        with torch.inference_mode():
            logits = model.model(**batch, logits_to_keep=columns, use_cache=False).logits
            return _likelihoods(logits, targets[:, columns])
    except torch.OutOfMemoryError as error:
        count = len(conversations)
        raise MemoryLimitError(f"{count} conversations at once need too much memory: lower the batch size") from error


def _encoded(model: ChatModel, conversation: Conversation) -> dict[str, Tensor]:
    """A conversation as a sample of training."""
    messages, images = conversation
    encoded = model.processor.encode_conversation(messages, has_images=bool(images))
    if encoded.num_images != len(images):
        raise UserError(
            f"a conversation has {encoded.num_images} {IMAGE_TAG} for {len(images)} images: write one where each "
            "image belongs"
        )
    if len(encoded.input_ids) > model.context_length:
        raise _too_long(model, len(encoded.input_ids))
    pixels = model.processor.image_processor(list(images), return_tensors="pt") if images else {}
    return {"input_ids": torch.tensor(encoded.input_ids), "labels": torch.tensor(encoded.labels), **pixels}


def _likelihoods(logits: Tensor, targets: Tensor) -> list[Likelihood]:
    """Of logits (B, K, vocabulary) for targets (B, K), of which those that are `IGNORE_INDEX` do not count."""
    counted = targets != IGNORE_INDEX
    loss = F.cross_entropy(logits.float().transpose(1, 2), targets, ignore_index=IGNORE_INDEX, reduction="none")
    greedy = ((logits.argmax(-1) == targets) | ~counted).all(1)
    totals, counts = -loss.double().sum(1), counted.sum(1)
    values = zip(totals.tolist(), counts.tolist(), greedy.tolist(), strict=True)
    return [Likelihood(*each) for each in values]


def _too_long(model: ChatModel, length: int) -> ContextLengthError:
    return ContextLengthError(
        f"a conversation has {length} tokens, visual ones included, and the model's context is "
        f"{model.context_length}: shorten it (fewer examples or images); nothing is cut"
    )
