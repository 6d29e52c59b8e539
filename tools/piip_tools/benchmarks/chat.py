"""Times two chat models in turns: encoder, first token, further tokens, second question, memory."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import GenerationConfig
from transformers.generation.streamers import BaseStreamer

from llava_piip.conversation_cache import ConversationCache
from piip_core.errors import UserError

from ..timing import Clock, clock_for, compare, limited_threads, peak_memory, take_turns
from .chat_models import TimedModel

_BEFORE_IMAGE = 5 / 8  # part of the text: the template's system message is longer than most questions


def measure_chat(
    models: Sequence[TimedModel],
    *,
    text_tokens: int = 64,
    new_tokens: int = 32,
    question_tokens: int = 24,
    image_size: tuple[int, int] = (1024, 768),
    repeats: int = 5,
    threads: int = 1,
    vision_only: bool = False,
) -> list[dict[str, Any]]:
    """Times a conversation of two questions, the same for all models but for the number of visual tokens.

    Args:
        models: On one device; the last one is the baseline.
        text_tokens: Of the first question and what the template puts around it.
        new_tokens: Of the first answer.
        question_tokens: Of the second question.
        image_size: Width and height in pixels.
        repeats: The medians are over so many.
        threads: CPU threads.
        vision_only: Leaves the language model out.

    Returns:
        Rows of `compare`: numbers of tokens and parameters; "weights" of all parameters and buffers, or with
        `vision_only` of those of the vision encoder; the most memory of an answer as `peak_memory` counts it; and
        times: "image to pixel values" from a decoded image, "vision encoder" of tower and projectors, "first token"
        from a decoded image and token ids, "second question, first token" by what is kept of the first answer.

    Raises:
        UserError: For a number that is too small, or a conversation that is too long for a model.
    """
    least = {"text_tokens": (text_tokens, 2), "new_tokens": (new_tokens, 2), "question_tokens": (question_tokens, 1)}
    for name, (value, smallest) in least.items():
        if value < smallest:
            raise UserError(f"{name}={value}: expected {smallest} or more")
    with limited_threads(threads):
        chats = {
            timed.name: _Conversation(
                timed,
                text_tokens,
                new_tokens,
                question_tokens,
                image_size,
                vision_only,
                clock_for(timed.model.device, threads),
            )
            for timed in models
        }
        times = take_turns({name: chat.measure for name, chat in chats.items()}, repeats)
        sizes = {name: chat.sizes() for name, chat in chats.items()}
    baseline = models[-1].name
    rows = [
        compare(what, unit, {name: [found[what, unit]] for name, found in sizes.items()}, baseline)
        for what, unit in sizes[baseline]
    ]
    return rows + [
        compare(what, unit, {name: [one[what, unit] for one in found] for name, found in times.items()}, baseline)
        for what, unit in times[baseline][0]
    ]


class _TokenTimes(BaseStreamer):
    """When the prompt and each token came."""

    def __init__(self, clock: Clock) -> None:
        self._clock, self.times = clock, []

    def put(self, value: Tensor) -> None:
        self.times.append(self._clock())

    def end(self) -> None:
        pass


class _Conversation:
    """One model, with what it is asked."""

    def __init__(
        self,
        timed: TimedModel,
        text_tokens: int,
        new_tokens: int,
        question_tokens: int,
        image_size: tuple[int, int],
        vision_only: bool,
        clock: Clock,
    ) -> None:
        self.model, self.processor, self.clock = timed.model, timed.image_processor, clock
        self.new_tokens, self.vision_only = new_tokens, vision_only
        config, generator = self.model.config, np.random.default_rng(0)
        width, height = image_size
        self.image = Image.fromarray(generator.integers(0, 256, (height, width, 3), dtype=np.uint8))
        words = min(self.model.get_input_embeddings().num_embeddings, config.image_token_id)
        text, question = np.split(generator.integers(3, words, text_tokens + question_tokens), [text_tokens])
        before, after = np.split(text, [round(_BEFORE_IMAGE * text_tokens)])
        self.prompt = [*before.tolist(), *[config.image_token_id] * config.image_seq_length, *after.tolist()]
        self.question = question.tolist()
        context = config.get_text_config().max_position_embeddings
        needed = len(self.prompt) + new_tokens + question_tokens + 1
        if needed > context:
            message = f"the conversation has {needed} tokens, the context of {timed.name} is {context}: ask for less"
            raise UserError(message)

    @torch.inference_mode()
    def measure(self) -> dict[tuple[str, str], float]:
        """Times, and tokens per second, by what they are of and their unit."""
        start = self.clock()
        pixels = self._prepare()
        prepared = self.clock()
        pixels = pixels.to(self.model.device)
        begin = self.clock()
        self.model.get_image_features(pixels)
        vision = self.clock() - begin
        found = {("image to pixel values", "ms"): 1e3 * (prepared - start), ("vision encoder", "ms"): 1e3 * vision}
        if self.vision_only:
            return found
        cache = ConversationCache(self.model)
        answer, first, rest = self._ask(cache, self.prompt, self.new_tokens)
        second = [*answer, *self.question]
        _, kept, _ = self._ask(cache, second, 1)
        _, nothing_kept, _ = self._ask(ConversationCache(self.model), second, 1)
        return found | {
            ("first token", "ms"): 1e3 * first,
            ("vision encoder's share of it", "%"): 100 * vision / first,
            ("further tokens", "per second"): (self.new_tokens - 1) / rest,
            ("second question, first token, nothing kept", "ms"): 1e3 * nothing_kept,
            ("second question, first token, keys and values kept", "ms"): 1e3 * kept,
        }

    def sizes(self) -> dict[tuple[str, str], float]:
        """What need not be measured more than once."""
        vision = torch.nn.ModuleList((self.model.model.vision_tower, self.model.model.multi_modal_projector))
        counted = vision if self.vision_only else self.model
        weights = sum(tensor.nbytes for tensor in (*counted.parameters(), *counted.buffers()))
        return {
            ("visual tokens", "number"): self.model.config.image_seq_length,
            ("prompt tokens", "number"): len(self.prompt),
            ("vision parameters", "M"): 1e-6 * sum(parameter.numel() for parameter in vision.parameters()),
            ("weights", "MB"): 1e-6 * weights,
            ("memory beside the weights", "MB"): 1e-6 * peak_memory(self._answer, self.model, self.model.device),
        }

    @torch.inference_mode()
    def _answer(self) -> None:
        if self.vision_only:
            self.model.get_image_features(self._prepare().to(self.model.device))
        else:
            self._ask(ConversationCache(self.model), self.prompt, self.new_tokens)

    def _prepare(self) -> Tensor:
        return self.processor(images=[self.image], return_tensors="pt")["pixel_values"]

    def _ask(self, cache: ConversationCache, ids: list[int], new_tokens: int) -> tuple[list[int], float, float]:
        """All token ids, seconds to the first new one, seconds of the others."""
        config = GenerationConfig(
            max_new_tokens=new_tokens,
            min_new_tokens=new_tokens,  # whatever the end tokens of a trained model are
            do_sample=False,
            pad_token_id=0,
        )
        stamps, start = _TokenTimes(self.clock), self.clock()
        output = cache.generate(ids, self._prepare(), config, streamer=stamps)
        first, last = stamps.times[1], stamps.times[-1]  # the prompt comes before them
        return output[0].tolist(), first - start, last - first
