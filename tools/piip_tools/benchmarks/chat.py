"""Times two chat models in turns: encoder, first token, further tokens, second question, memory."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import AutoModelForCausalLM, GenerationConfig, LlamaConfig
from transformers.generation.streamers import BaseStreamer

from llava_piip.assembly import assemble_config, join
from llava_piip.conversation_cache import ConversationCache
from llava_piip.image_processing import PIIPImageProcessor
from llava_piip.inference import ChatModel
from llava_piip.modeling import PIIPLlavaForConditionalGeneration, PIIPVisionModel
from piip_core import ConvNeXtConfig, PIIPConfig, zoo
from piip_core.errors import ConfigError, UserError, check

from ..timing import Clock, clock_for, compare, limited_threads, peak_memory, take_turns

# Architecture of the language models that the published models name
LANGUAGE_MODELS: Mapping[str, Mapping[str, int]] = {
    "lmsys/vicuna-7b-v1.5": dict(
        hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32, vocab_size=32000
    ),
    "lmsys/vicuna-13b-v1.5": dict(
        hidden_size=5120, intermediate_size=13824, num_hidden_layers=40, num_attention_heads=40, vocab_size=32000
    ),
}
_CONTEXT_LENGTH = 4096
_IMAGE_SIZE = (1024, 768)  # width and height
_BEFORE_IMAGE = 5 / 8  # part of the text: the template's system message is longer than most questions
_QUESTION_TOKENS = 24  # of the second question


@dataclass(frozen=True, kw_only=True)
class TimedModel:
    """One of the models, in evaluation mode."""

    name: str
    model: PIIPLlavaForConditionalGeneration
    image_processor: Any


def build_pair(
    name: str,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.bfloat16,
    divide_widths: int = 1,
    projector_grid: int | None = None,
    language: bool = True,
) -> tuple[TimedModel, TimedModel]:
    """A published model and the LLaVA-1.5 of its size, with random weights and one language model for both.

    Args:
        name: Of the zoo, and no baseline.
        device: Of the models.
        dtype: Of the models.
        divide_widths: Makes both narrower by this factor: branches, interactions (with heads as wide as before),
            language model and its vocabulary. Image sizes, numbers of tokens, depths, and shares of the matrix products
            stay.
        projector_grid: Height and width of the grid of visual tokens of the first one; None for the published grid.
        language: False leaves the layers of the language model out, for the vision encoders alone.

    Raises:
        ConfigError: For an unknown name, a baseline, or widths that cannot be divided.
    """
    entry = zoo.multimodal(name)
    if entry.feature_block is not None:
        names = [other.name for other in zoo.multimodal_entries() if other.feature_block is None]
        raise ConfigError(f"{name!r} is a baseline: expected one of {', '.join(names)}")
    baseline = next(
        other
        for other in zoo.multimodal_entries()
        if other.feature_block is not None and other.language_model == entry.language_model
    )
    sizes = dict(LANGUAGE_MODELS[entry.language_model])
    for field in ("hidden_size", "intermediate_size", "num_attention_heads", "vocab_size"):
        sizes[field] = _divided(field, sizes[field], divide_widths)
    if not language:
        sizes["num_hidden_layers"] = 0
    text_config = LlamaConfig(**sizes, max_position_embeddings=_CONTEXT_LENGTH)
    models = []
    with torch.device(device):
        decoder = AutoModelForCausalLM.from_config(text_config, dtype=dtype, trust_remote_code=False)
        for one, grid in ((entry, projector_grid), (baseline, None)):
            narrow = dataclasses.replace(one, vision=_narrower(one.vision, divide_widths))
            config = assemble_config(narrow, text_config, image_token_id=text_config.vocab_size, projector_grid=grid)
            tower = PIIPVisionModel(config.vision_config).to(dtype=dtype)
            title = f"{one.title} {one.resolution}" + (f", widths / {divide_widths}" if divide_widths > 1 else "")
            processor = PIIPImageProcessor(size=config.vision_config.image_size)
            models.append(TimedModel(name=title, model=join(config, tower, decoder), image_processor=processor))
    return models[0], models[1]


def load_pair(
    model: Path, baseline: Path, *, device: str | None = None, dtype: str | torch.dtype = "auto"
) -> list[TimedModel]:
    """Two trained or converted models, each with its own language model.

    Raises:
        UserError: As `ChatModel.load`.
    """
    models = []
    for folder in (model, baseline):
        chat = ChatModel.load(folder, device=device, dtype=dtype)
        models.append(TimedModel(name=str(folder), model=chat.model, image_processor=chat.processor.image_processor))
    return models


def _narrower(vision: PIIPConfig, divisor: int) -> PIIPConfig:
    def divide(config: Any, *names: str) -> Any:
        return dataclasses.replace(config, **{name: _divided(name, getattr(config, name), divisor) for name in names})

    branches = []
    for branch in vision.branches:
        names = ("stage_dims",) if isinstance(branch.network, ConvNeXtConfig) else ("embed_dim", "num_heads")
        branches.append(dataclasses.replace(branch, network=divide(branch.network, *names)))
    return dataclasses.replace(vision, branches=tuple(branches), interaction=divide(vision.interaction, "num_heads"))


def _divided(name: str, value: int | tuple[int, ...], divisor: int) -> int | tuple[int, ...]:
    if isinstance(value, tuple):
        return tuple(_divided(name, one, divisor) for one in value)
    if divisor < 1 or value % divisor:
        raise ConfigError(f"divide_widths={divisor}: expected 1 or more and a divisor of {value} ({name})")
    return value // divisor


def measure_chat(
    models: Sequence[TimedModel],
    *,
    text_tokens: int = 64,
    new_tokens: int = 32,
    repeats: int = 5,
    threads: int = 1,
    vision_only: bool = False,
) -> list[dict[str, Any]]:
    """Times a conversation of two questions, the same for all models but for the number of visual tokens.

    Args:
        models: On one device; the last one is the baseline.
        text_tokens: Of the first question and what the template puts around it.
        new_tokens: Of the first answer, 2 or more.
        repeats: Rounds that the medians are over.
        threads: Of the CPU.
        vision_only: Leaves the language model out.

    Returns:
        Rows of `compare`: numbers of tokens and parameters; "weights" of all parameters and buffers, or with
        `vision_only` of those of the vision encoder; the most memory of an answer as `peak_memory` counts it; and
        times: "image to pixel values" from a decoded image, "vision encoder" of tower and projectors, "first token"
        from a decoded image and token ids, "second question, first token" by what is kept of the first answer.

    Raises:
        UserError: For a number that is too small, or a conversation that is too long for a model.
    """
    check(new_tokens >= 2, "new_tokens", new_tokens, "2 or more")
    with limited_threads(threads):
        clock = clock_for(models[-1].model.device, threads)
        chats = {timed.name: _Conversation(timed, clock, text_tokens, new_tokens, vision_only) for timed in models}
        times = take_turns({name: chat.measure for name, chat in chats.items()}, repeats)
        sizes = {name: [chat.sizes()] for name, chat in chats.items()}
    baseline = models[-1].name
    return [
        compare(what, unit, {name: [one[what, unit] for one in values] for name, values in found.items()}, baseline)
        for found in (sizes, times)
        for what, unit in found[baseline][0]
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

    def __init__(self, timed: TimedModel, clock: Clock, text_tokens: int, new_tokens: int, vision_only: bool) -> None:
        self.model, self.processor, self.clock = timed.model, timed.image_processor, clock
        self.new_tokens, self.vision_only = new_tokens, vision_only
        config, generator = self.model.config, np.random.default_rng(0)
        width, height = _IMAGE_SIZE
        self.image = Image.fromarray(generator.integers(0, 256, (height, width, 3), dtype=np.uint8))
        words = min(self.model.get_input_embeddings().num_embeddings, config.image_token_id)
        text, question = np.split(generator.integers(3, words, text_tokens + _QUESTION_TOKENS), [text_tokens])
        before, after = np.split(text, [round(_BEFORE_IMAGE * text_tokens)])
        self.prompt = [*before.tolist(), *[config.image_token_id] * config.image_seq_length, *after.tolist()]
        self.question = question.tolist()
        context = config.get_text_config().max_position_embeddings
        needed = len(self.prompt) + new_tokens + _QUESTION_TOKENS + 1
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
