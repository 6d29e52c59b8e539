"""Times both sides in turn: encoder, first token, further tokens, second question, memory."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm
from transformers import GenerationConfig
from transformers.generation.streamers import BaseStreamer

from llava_piip.conversation_cache import ConversationCache
from piip_core.errors import UserError

from ..memory import AliveStorages
from ..timing import limited_threads, now_for
from .sides import Side

__all__ = ["SideResult", "Workload", "compare"]

_NOTHING, _KEPT = "nothing", "keys and values"
_FRONT = 5 / 8  # part of the text in front of the picture: the template's system message is longer than most questions


@dataclass(frozen=True, kw_only=True)
class Workload:
    """A conversation of two questions, the same for both sides but for the number of visual tokens.

    Attributes:
        text_tokens: Of the first question and what the template puts around it.
        new_tokens: Of the first answer.
        question_tokens: Of the second question.
        image_size: Width and height of the picture in pixels.
    """

    text_tokens: int = 64
    new_tokens: int = 32
    question_tokens: int = 24
    image_size: tuple[int, int] = (1024, 768)

    def __post_init__(self) -> None:
        for name, least in (("text_tokens", 2), ("new_tokens", 2), ("question_tokens", 1)):
            if getattr(self, name) < least:
                raise UserError(f"{name}={getattr(self, name)}: expected {least} or more")


@dataclass(frozen=True, kw_only=True)
class SideResult:
    """Medians of one side. Seconds are CPU time where there is one thread on a CPU, wall time elsewhere.

    Attributes:
        name: Of the side.
        visual_tokens: Of the picture.
        prompt_tokens: Of the first question, visual ones included.
        vision_parameters: Of vision tower and projectors.
        weight_bytes: Of all parameters and buffers, or those of the vision encoder where that is measured alone. What
            both sides share counts for each.
        working_bytes: The most memory beside the weights during an answer. On a GPU what PyTorch's allocator gave out,
            on a CPU the tensors alive (not what kernels take for themselves, nor what the process keeps).
        prepare_s: From a decoded picture to pixel values.
        vision_s: Vision tower and projectors.
        first_token_s: From a decoded picture and token ids to the first token: preparation, vision, language model.
        tokens_per_s: Behind the first token.
        second_s: To the first token of the second answer, by what is kept of the first one: "nothing", "keys and
            values".
    """

    name: str
    visual_tokens: int
    prompt_tokens: int
    vision_parameters: int
    weight_bytes: int
    working_bytes: int
    prepare_s: float
    vision_s: float
    first_token_s: float | None = None
    tokens_per_s: float | None = None
    second_s: dict[str, float] | None = None

    @property
    def vision_share(self) -> float | None:
        """Part of the vision encoder in the time to the first token."""
        return None if self.first_token_s is None else self.vision_s / self.first_token_s

    def to_dict(self) -> dict[str, Any]:
        """All fields and the share, for JSON."""
        return {**asdict(self), "vision_share": self.vision_share}


def compare(
    sides: Sequence[Side],
    workload: Workload | None = None,
    *,
    repeats: int = 5,
    threads: int = 1,
    vision_only: bool = False,
) -> list[SideResult]:
    """Measures all sides, in turn within each of the repetitions and in changing order.

    One repetition before them is not counted. With one thread on a CPU, CPU time is taken, which other load on the
    machine disturbs least.

    Args:
        sides: The models, on one device.
        workload: What is asked.
        repeats: The medians are over so many.
        threads: CPU threads.
        vision_only: Leave the language model out.

    Raises:
        UserError: For a number that is too small.
    """
    if repeats < 1 or threads < 1:
        raise UserError(f"repeats={repeats}, threads={threads}: expected 1 or more")
    with limited_threads(threads):
        measured = [_Measured(side, workload or Workload(), threads, vision_only) for side in sides]
        for repetition in tqdm(range(-1, repeats), desc="benchmark", leave=False):
            for one in measured[:: -1 if repetition % 2 else 1]:
                found = one.once()
                if repetition >= 0:
                    one.found.append(found)
        return [one.result() for one in measured]


class _Answer(NamedTuple):
    ids: list[int]
    first: float
    rest: float


class _Stamps(BaseStreamer):
    """When each token came."""

    def __init__(self, now: Callable[[], float]) -> None:
        self._now, self.times = now, []

    def put(self, value: Tensor) -> None:
        self.times.append(self._now())

    def end(self) -> None:
        pass


class _Measured:
    """One side while it is measured."""

    def __init__(self, side: Side, workload: Workload, threads: int, vision_only: bool) -> None:
        self.side, self.workload, self.vision_only = side, workload, vision_only
        self.found: list[dict[str, float]] = []
        self._now = now_for(side.model.device, threads)
        generator = np.random.default_rng(0)
        width, height = workload.image_size
        self._image = Image.fromarray(generator.integers(0, 256, (height, width, 3), dtype=np.uint8))
        model = side.model
        self._words = generator.integers(
            3, min(model.get_input_embeddings().num_embeddings, model.config.image_token_id), 10**5
        )
        front = round(_FRONT * workload.text_tokens)
        visual = np.full(model.config.image_seq_length, model.config.image_token_id)
        words = self._words[: workload.text_tokens]
        self._prompt = np.concatenate((words[:front], visual, words[front:])).tolist()
        room = model.config.get_text_config().max_position_embeddings
        needed = len(self._prompt) + workload.new_tokens + workload.question_tokens + 1
        if needed > room:
            raise UserError(f"the conversation has {needed} tokens, the context of {side.name} is {room}: ask for less")
        self._cache = ConversationCache(model)

    @torch.inference_mode()
    def once(self) -> dict[str, float]:
        """Seconds of everything, and tokens per second."""
        model, start = self.side.model, self._now()
        pixels = self.side.image_processor(images=[self._image], return_tensors="pt")["pixel_values"]
        prepared = self._now()
        pixels = pixels.to(model.device)
        begin = self._now()
        model.get_image_features(pixels)
        found = {"prepare_s": prepared - start, "vision_s": self._now() - begin}
        if self.vision_only:
            return found
        new = self.workload.new_tokens
        self._cache.clear()
        answer = self._ask(self._prompt, new)
        found |= {"first_token_s": answer.first, "tokens_per_s": (new - 1) / answer.rest}
        second = [*answer.ids, *self._words[-self.workload.question_tokens :].tolist()]
        found[_KEPT] = self._ask(second, 1).first
        self._cache.clear()
        found[_NOTHING] = self._ask(second, 1).first
        return found

    def result(self) -> SideResult:
        """Medians, with what need not be measured more than once."""
        model = self.side.model
        median = {name: statistics.median(found[name] for found in self.found) for name in self.found[0]}
        second = {name: median.pop(name) for name in (_NOTHING, _KEPT) if name in median}
        vision = torch.nn.ModuleList((model.model.vision_tower, model.model.multi_modal_projector))
        counted = vision if self.vision_only else model
        return SideResult(
            name=self.side.name,
            visual_tokens=model.config.image_seq_length,
            prompt_tokens=len(self._prompt),
            vision_parameters=sum(parameter.numel() for parameter in vision.parameters()),
            weight_bytes=sum(tensor.nbytes for tensor in (*counted.parameters(), *counted.buffers())),
            working_bytes=self._working_bytes(),
            second_s=second or None,
            **median,
        )

    def _working_bytes(self) -> int:
        """Of an answer in eager mode, with nothing kept from before."""
        device = self.side.model.device

        @torch.inference_mode()
        def run() -> None:
            if self.vision_only:
                pixels = self.side.image_processor(images=[self._image], return_tensors="pt")["pixel_values"]
                self.side.model.get_image_features(pixels.to(device))
            else:
                self._ask(self._prompt, self.workload.new_tokens)

        self._cache.clear()
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            before = torch.cuda.memory_allocated(device)
            run()
            return torch.cuda.max_memory_allocated(device) - before
        with AliveStorages(self.side.model) as tracker:
            run()
        return tracker.peak

    def _ask(self, ids: list[int], new_tokens: int) -> _Answer:
        config = GenerationConfig(
            max_new_tokens=new_tokens,
            min_new_tokens=new_tokens,  # whatever the end tokens of a trained model are
            do_sample=False,
            pad_token_id=0,
        )
        stamps, start = _Stamps(self._now), self._now()
        pixels = self.side.image_processor(images=[self._image], return_tensors="pt")["pixel_values"]
        output = self._cache.generate(ids, pixels, config, streamer=stamps)
        _, first, *_ = times = stamps.times  # the prompt comes in front
        return _Answer(output[0].tolist(), first - start, times[-1] - first)
