"""Times two models in turns: encoder, first token, further tokens, second question, memory."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from tabulate import tabulate
from torch import Tensor
from transformers import GenerationConfig
from transformers.generation.streamers import BaseStreamer

from llava_piip.conversation_cache import ConversationCache
from piip_core.errors import UserError

from ..reporting import draw_bars, new_figure
from ..timing import Clock, clock_for, limited_threads, peak_memory, take_turns
from .models import TimedModel

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["draw_results", "format_results", "measure_chat"]

_BEFORE_IMAGE = 5 / 8  # part of the text: the template's system message is longer than most questions

# Title: key in a result, factor, digits
_LINES = {
    "visual tokens": ("visual_tokens", 1, "d"),
    "prompt tokens": ("prompt_tokens", 1, "d"),
    "vision parameters, M": ("vision_parameters", 1e-6, ".1f"),
    "weights, MB": ("weight_bytes", 1e-6, ".0f"),
    "memory beside the weights, MB": ("working_bytes", 1e-6, ".0f"),
    "image to pixel values, ms": ("prepare_s", 1e3, ".1f"),
    "vision encoder, ms": ("vision_s", 1e3, ".1f"),
    "first token, ms": ("first_token_s", 1e3, ".1f"),
    "vision encoder's share of it, %": ("vision_share", 100, ".1f"),
    "further tokens per second": ("tokens_per_s", 1, ".2f"),
    "second question, first token, nothing kept, ms": ("second_nothing_kept_s", 1e3, ".1f"),
    "second question, first token, keys and values kept, ms": ("second_cache_kept_s", 1e3, ".1f"),
}


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
        models: On one device.
        text_tokens: Of the first question and what the template puts around it.
        new_tokens: Of the first answer.
        question_tokens: Of the second question.
        image_size: Width and height in pixels.
        repeats: The medians are over so many.
        threads: CPU threads.
        vision_only: Leaves the language model out.

    Returns:
        A result per model with numbers of tokens and parameters; "weight_bytes" of all parameters and buffers, or with
        `vision_only` of those of the vision encoder; "working_bytes", the most memory of an answer as `peak_memory`
        counts it; and median seconds: "prepare_s" from a decoded image to pixel values, "vision_s" of tower and
        projectors, "first_token_s" from a decoded image and token ids to the first token, "second_..._kept_s" to that
        of the second answer, by what is kept of the first one.

    Raises:
        UserError: For a number that is too small, or a conversation that is too long for a model.
    """
    least = {"text_tokens": (text_tokens, 2), "new_tokens": (new_tokens, 2), "question_tokens": (question_tokens, 1)}
    for name, (value, smallest) in (least | {"repeats": (repeats, 1), "threads": (threads, 1)}).items():
        if value < smallest:
            raise UserError(f"{name}={value}: expected {smallest} or more")
    with limited_threads(threads):
        chats = [
            _Conversation(timed, text_tokens, new_tokens, question_tokens, image_size, vision_only, threads)
            for timed in models
        ]
        times = take_turns([chat.measure for chat in chats], repeats)
        return [chat.summarize(found) for chat, found in zip(chats, times, strict=True)]


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
        threads: int,
    ) -> None:
        self.name, self.model, self.processor = timed.name, timed.model, timed.image_processor
        self.new_tokens, self.vision_only = new_tokens, vision_only
        self.clock, self.cache = clock_for(self.model.device, threads), ConversationCache(self.model)
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
            message = f"the conversation has {needed} tokens, the context of {self.name} is {context}: ask for less"
            raise UserError(message)

    @torch.inference_mode()
    def measure(self) -> dict[str, float]:
        """Seconds of everything, and tokens per second."""
        start = self.clock()
        pixels = self._prepare()
        prepared = self.clock()
        pixels = pixels.to(self.model.device)
        begin = self.clock()
        self.model.get_image_features(pixels)
        found = {"prepare_s": prepared - start, "vision_s": self.clock() - begin}
        if self.vision_only:
            return found
        self.cache = ConversationCache(self.model)
        answer, first, rest = self._ask(self.prompt, self.new_tokens)
        found |= {"first_token_s": first, "tokens_per_s": (self.new_tokens - 1) / rest}
        _, found["second_cache_kept_s"], _ = self._ask([*answer, *self.question], 1)
        self.cache = ConversationCache(self.model)
        _, found["second_nothing_kept_s"], _ = self._ask([*answer, *self.question], 1)
        return found

    def summarize(self, found: Sequence[Mapping[str, float]]) -> dict[str, Any]:
        """Medians, with what need not be measured more than once."""
        medians = {name: statistics.median(one[name] for one in found) for name in found[0]}
        if not self.vision_only:
            medians["vision_share"] = medians["vision_s"] / medians["first_token_s"]
        vision = torch.nn.ModuleList((self.model.model.vision_tower, self.model.model.multi_modal_projector))
        counted = vision if self.vision_only else self.model
        self.cache = ConversationCache(self.model)
        return {
            "name": self.name,
            "visual_tokens": self.model.config.image_seq_length,
            "prompt_tokens": len(self.prompt),
            "vision_parameters": sum(parameter.numel() for parameter in vision.parameters()),
            "weight_bytes": sum(tensor.nbytes for tensor in (*counted.parameters(), *counted.buffers())),
            "working_bytes": peak_memory(self._answer, self.model, self.model.device),
            **medians,
        }

    @torch.inference_mode()
    def _answer(self) -> None:
        if self.vision_only:
            self.model.get_image_features(self._prepare().to(self.model.device))
        else:
            self._ask(self.prompt, self.new_tokens)

    def _prepare(self) -> Tensor:
        return self.processor(images=[self.image], return_tensors="pt")["pixel_values"]

    def _ask(self, ids: list[int], new_tokens: int) -> tuple[list[int], float, float]:
        """All token ids, seconds to the first new one, seconds of the others."""
        config = GenerationConfig(
            max_new_tokens=new_tokens,
            min_new_tokens=new_tokens,  # whatever the end tokens of a trained model are
            do_sample=False,
            pad_token_id=0,
        )
        stamps, start = _TokenTimes(self.clock), self.clock()
        output = self.cache.generate(ids, self._prepare(), config, streamer=stamps)
        first, last = stamps.times[1], stamps.times[-1]  # the prompt comes before them
        return output[0].tolist(), first - start, last - first


def format_results(results: Sequence[Mapping[str, Any]]) -> str:
    """A line for each measure, with a column for each model and the ratio of the first to the second."""
    lines = []
    for title, (key, factor, digits) in _LINES.items():
        if all(key in result for result in results):
            values = [result[key] for result in results]
            ratio = f"{values[0] / values[1]:.2f}" if len(values) > 1 and values[1] else ""
            lines.append([title, *(format(factor * value, digits) for value in values), ratio])
    align = ("left", *["right"] * len(results), "right")
    headers = ["", *(result["name"] for result in results), "ratio"]
    return tabulate(lines, headers, tablefmt="github", disable_numparse=True, colalign=align)


def draw_results(results: Sequence[Mapping[str, Any]], title: str) -> Figure:
    """The time to the first token in parts, and that of a second answer by what was kept of the first one."""
    figure = new_figure((10, 1.8 + len(results)), title)
    first, second = figure.subplots(1, 2, width_ratios=(1.3, 1))
    names = [result["name"].replace(", ", "\n") for result in results]
    parts = {
        "pixel values": [result["prepare_s"] for result in results],
        "vision encoder": [result["vision_s"] for result in results],
        "language model": [result["first_token_s"] - result["vision_s"] - result["prepare_s"] for result in results],
    }
    kept = {
        "nothing kept": [result["second_nothing_kept_s"] for result in results],
        "keys and values kept": [result["second_cache_kept_s"] for result in results],
    }
    draw_bars(first, names, parts, xlabel="first token of an answer, seconds", stacked=True)
    draw_bars(second, names, kept, xlabel="first token of a second answer, seconds")
    second.set_yticks([])
    for axes in (first, second):
        axes.legend(fontsize=8)
    return figure
