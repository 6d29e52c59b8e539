"""Answers to many clients at a time, by transformers' continuous batching.

transformers' engine takes requests in and lets them go after every token, shares the cache of prompts that start
alike, and knows nothing of pictures: a request is a list of token ids. `FeatureTable` gives every picture ids of its
own, and a hook in front of the model turns them into visual tokens.
"""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncIterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from PIL import Image
from torch import Tensor
from transformers import ContinuousBatchingConfig, GenerationConfig
from transformers.generation.continuous_batching.cb_logits_processors import ContinuousBatchingTopKLogitsWarper

from piip_core.errors import ConfigError

from ..conversation import Messages
from .features import FeatureTable, Picture
from .generation import DEFAULT_NEW_TOKENS, ChatModel
from .prompt_cache import picture_key
from .streaming import AnswerText, TokenText

__all__ = ["Answer", "Engine", "EngineError", "EngineSettings", "Sampling"]

FinishReason = Literal["stop", "length"]

DEFAULT_BATCH = 32
_START_SECONDS = 600.0
_STOP_SECONDS = 30.0


class EngineError(RuntimeError):
    """The engine has stopped, or failed at a request."""


@dataclass(frozen=True, kw_only=True)
class EngineSettings:
    """How much is done at a time.

    Attributes:
        max_batch: Most answers that are generated together, others wait; None for 32, and for 8 on a CPU. Without
            flash attention every token attends over the cache of all answers, so that more are slower from there on.
        image_places: Pictures whose visual tokens are kept on the device.
        cache_tokens: Room of the key and value cache, in tokens of all answers together; None for most of the memory
            that is free on a GPU, and for four full contexts or 8192 tokens on a CPU.
        share_prefixes: Whether prompts that start alike are computed once. Clients who measure times could find out
            whether another one has sent the same picture shortly before.
        compiled: Whether steps are compiled, by transformers' choice of which: starting takes minutes. CUDA graphs it
            records by itself, where flash attention is installed.
        threads: That make pixel values of pictures.

    Raises:
        ConfigError: For a number that is not positive.
    """

    max_batch: int | None = None
    image_places: int = 64
    cache_tokens: int | None = None
    share_prefixes: bool = True
    compiled: bool = False
    threads: int = 4

    def __post_init__(self) -> None:
        for name in ("max_batch", "image_places", "cache_tokens", "threads"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name}={value}: expected at least 1")


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How an answer is made.

    Attributes:
        max_new_tokens: Most tokens of it; None for `DEFAULT_NEW_TOKENS` or what the context leaves.
        temperature: 0 takes the most probable token each time.
        top_p: Sample among the most probable tokens that together have this probability.
        stop: Texts that end the answer and are no part of it.
    """

    max_new_tokens: int | None = None
    temperature: float = 0.0
    top_p: float = 1.0
    stop: tuple[str, ...] = ()


class Engine:
    """A model that answers many conversations at a time. Belongs to one event loop, and owns the model while it runs.

    Args:
        chat: The model.
        settings: How much is done at a time.

    Attributes:
        max_batch: Most answers that are generated together.
    """

    def __init__(self, chat: ChatModel, settings: EngineSettings | None = None) -> None:
        self.chat = chat
        self.settings = settings or EngineSettings()
        self.max_batch = self.settings.max_batch or (8 if chat.device.type == "cpu" else DEFAULT_BATCH)
        model = chat.model
        self._model = model.get_base_model() if hasattr(model, "get_base_model") else model  # out of peft's wrapper
        self._embedding = self._model.get_input_embeddings()
        tokenizer = chat.processor.tokenizer
        self._features = FeatureTable(
            self._embedding,
            places=self.settings.image_places,
            length=chat.processor.image_seq_length,
            first_id=max(len(tokenizer), self._embedding.num_embeddings, chat.processor.image_token_id + 1),
        )
        self._prepare = ThreadPoolExecutor(self.settings.threads, "prepare")
        self._see = ThreadPoolExecutor(1, "see")  # one after the other: the second of two equal pictures is there
        self._manager: Any = None
        self._hook: Any = None

    @property
    def alive(self) -> bool:
        """Whether it runs and can answer."""
        manager = self._manager
        return (
            manager is not None
            and manager.is_running()
            and manager.background_thread_status.can_accept_new_requests() is None
        )

    async def start(self) -> None:
        """Allocates the cache and starts.

        Raises:
            EngineError: If that fails.
        """
        self._hook = self._model.register_forward_pre_hook(self._embed_pictures, with_kwargs=True)
        self._manager = self._model.init_continuous_batching(self._generation_config(), self._batching_config())
        _choose_most_probable(self._manager.logit_processor)
        self._manager.start()
        deadline = time.monotonic() + _START_SECONDS
        while self._manager.batch_processor is None:
            if not self.alive or time.monotonic() > deadline:
                error = self._manager.background_thread_status.fatal_error
                await self.stop()
                raise EngineError(f"the engine does not start: {error or 'no answer in time'}")
            await asyncio.sleep(0.01)

    async def stop(self) -> None:
        """Ends at once; answers that run are lost to their clients with an error."""
        if self._manager is not None:
            await asyncio.to_thread(self._manager.stop, block=True, timeout=_STOP_SECONDS, hard_stop=True)
            self._manager = None
        if self._hook is not None:
            self._hook.remove()
            self._hook = None
        self._prepare.shutdown(wait=False, cancel_futures=True)
        self._see.shutdown(wait=False, cancel_futures=True)

    async def prepare(self, messages: Messages, images: Sequence[Image.Image], sampling: Sampling) -> Answer:
        """An answer that can be generated.

        Args:
            messages: As `PIIPLlavaProcessor.apply_chat_template` takes them.
            images: Those of all messages, in order.
            sampling: How it is made.

        Raises:
            UserError: If the conversation or the settings cannot be used.
        """
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._prepare, self._prepared, messages, list(images), sampling)

    def _prepared(self, messages: Messages, images: list[Image.Image], sampling: Sampling) -> Answer:
        asked = sampling.max_new_tokens
        config = self.chat.generation_config(
            max_new_tokens=DEFAULT_NEW_TOKENS if asked is None else asked,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
        )
        inputs = self.chat.encode(messages, images, max_new_tokens=1 if asked is None else asked)
        ids = inputs["input_ids"][0].tolist()
        config.max_new_tokens = min(config.max_new_tokens, self.chat.context_length - len(ids))
        keys = [picture_key(image) for image in images]
        return Answer(self, ids, keys, inputs.get("pixel_values"), config, (*self.chat.end_texts, *sampling.stop))

    @asynccontextmanager
    async def _seen(self, keys: Sequence[bytes], pixels: Tensor | None) -> AsyncIterator[list[int]]:
        """Ids of all visual tokens, in order, while their features stay in the table."""
        async with self._features.use(keys) as pictures:
            if pictures:
                loop = asyncio.get_running_loop()
                await loop.run_in_executor(self._see, self._look, pictures, pixels)
            yield [token for picture in pictures for token in picture.ids]

    @torch.inference_mode()
    def _look(self, pictures: Sequence[Picture], pixels: Tensor) -> None:
        new = {picture.key: number for number, picture in enumerate(pictures) if not picture.ready}
        if not new:
            return
        numbers = sorted(new.values())
        tokens = self._model.get_image_features(pixels[numbers]).pooler_output
        for number, rows in zip(numbers, tokens, strict=True):
            self._features.write(pictures[number], rows)
        if pixels.is_cuda:  # the engine reads them in a stream of its own
            torch.cuda.current_stream(pixels.device).synchronize()

    async def _generate(self, ids: list[int], config: GenerationConfig) -> AsyncIterator[tuple[list[int], bool]]:
        """All tokens so far after each step, and whether they are all."""
        manager, loop_queue, request = self._manager, asyncio.Queue(), uuid.uuid4().hex
        if not self.alive:
            raise EngineError("the engine has stopped")
        manager.register_result_handler(request, loop_queue.put_nowait)
        finished = False
        try:
            accepted = manager.add_request(
                ids,
                request_id=request,
                max_new_tokens=config.max_new_tokens,
                streaming=True,
                eos_token_id=config.eos_token_id,
                temperature=config.temperature,
                top_p=config.top_p,
                top_k=0 if config.do_sample else 1,
            )
            if accepted is None:
                raise EngineError("the engine has stopped")
            while not finished:
                output = await loop_queue.get()
                finished = output.is_finished()
                if output.error is not None:
                    raise EngineError(output.error)
                yield output.generated_tokens, finished
        finally:
            manager.output_router.result_handlers.pop(request, None)
            if not finished:
                manager.cancel_request(request)

    def _embed_pictures(self, module: Any, arguments: Any, options: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        ids = options.pop("input_ids")
        return arguments, options | {"inputs_embeds": self._features.embed(self._embedding, ids)}

    def _generation_config(self) -> GenerationConfig:
        # Values that make transformers build the processors of each setting; every request brings its own
        config = self.chat.generation_config(temperature=0.5, top_p=0.5)
        config.top_k = 1
        return config

    def _batching_config(self) -> ContinuousBatchingConfig:
        settings, page = self.settings, 32
        tokens, most = settings.cache_tokens, None
        if self.chat.device.type == "cpu":  # where nothing is found out by itself
            tokens = tokens or max(4 * self.chat.context_length, 8192)
            most = min(tokens, 1024)
        return ContinuousBatchingConfig(
            page_size=page,
            num_blocks=None if tokens is None else -(-max(tokens, self.chat.context_length) // page) + 1,
            max_batch_tokens=most,
            max_requests_per_batch=self.max_batch,
            max_memory_percent=0.7,  # the vision tower needs some, too
            allow_block_sharing=settings.share_prefixes,
            default_compile_level=int(settings.compiled),
            per_request_processors=True,
        )


class Answer:
    """An answer to one conversation; `Engine.prepare` makes it.

    Attributes:
        prompt_tokens: Tokens of the conversation, visual ones included.
        tokens: Ids generated so far, the end token among them.
        finish_reason: None while it runs; then "stop" (the model ended it) or "length".
    """

    def __init__(
        self,
        engine: Engine,
        ids: list[int],
        keys: Sequence[bytes],
        pixels: Tensor | None,
        config: GenerationConfig,
        ends: Sequence[str],
    ) -> None:
        self.prompt_tokens = len(ids)
        self.tokens: list[int] = []
        self.finish_reason: FinishReason | None = None
        self._engine, self._ids, self._keys, self._pixels = engine, ids, keys, pixels
        self._config, self._ends = config, ends

    async def pieces(self) -> AsyncIterator[str]:
        """The text as it is generated; closing the iterator ends the generation.

        Raises:
            EngineError: If the engine fails.
        """
        processor = self._engine.chat.processor
        text, decoder = AnswerText(self._ends), TokenText(processor.tokenizer)
        async with self._engine._seen(self._keys, self._pixels) as visual:
            self._pixels, left = None, iter(visual)
            ids = [next(left) if token == processor.image_token_id else token for token in self._ids]
            steps = self._engine._generate(ids, self._config)
            try:
                async for tokens, finished in steps:
                    self.tokens = tokens
                    piece = text.add(decoder.add(tokens, finished=finished))
                    if finished or text.ended:
                        ended = text.ended or tokens[-1] in self._config.eos_token_id
                        self.finish_reason = "stop" if ended else "length"
                        piece += text.rest()
                    if piece:
                        yield piece
                    if self.finish_reason:
                        return
            finally:
                await steps.aclose()


class _MostProbable(ContinuousBatchingTopKLogitsWarper):
    """Leaves the most probable token alone where a request says top_k=1.

    transformers' own keeps all that are equally probable, which in bfloat16 happens, and then draws one of them.
    """

    def __init__(self) -> None:
        self.top_k, self.min_tokens_to_keep, self.filter_value = 0, 0, -torch.inf

    def __call__(self, scores: Tensor, tensor_arg: Tensor) -> Tensor:
        others = torch.ones_like(scores, dtype=torch.bool).scatter_(-1, scores.argmax(-1, keepdim=True), False)
        chosen = (tensor_arg[: len(scores)] == 1).unsqueeze(-1)
        return scores.masked_fill(chosen & others, -torch.inf)


def _choose_most_probable(processors: Any) -> None:
    """Puts `_MostProbable` in the place of transformers' own processor."""
    listed = processors.logits_processor
    for number, processor in enumerate(listed):
        if isinstance(processor, ContinuousBatchingTopKLogitsWarper):
            listed[number] = _MostProbable()
            return
    raise EngineError("transformers made no processor for top_k: this version of it is not supported")
