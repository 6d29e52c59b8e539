"""What is kept between two answers: keys and values of conversations, and visual tokens of pictures.

A conversation that goes on sends everything that was said before once more. Of a prompt that starts with the tokens
and pictures of a kept one, only the rest is computed.
"""

from __future__ import annotations

import copy
import hashlib
import itertools
import threading
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from transformers import Cache, CompileConfig, DynamicCache, GenerationConfig, PreTrainedModel, StaticCache
from transformers.cache_utils import DynamicLayer, StaticLayer
from transformers.modeling_outputs import BaseModelOutputWithPooling

from piip_core.errors import ConfigError

from ..processing import fetch_image

__all__ = ["Pictures", "PromptCache", "picture_key"]

_LEAST_PLACES = 512  # of a static cache


@dataclass(frozen=True)
class Pictures:
    """Pictures of a prompt, in order; `PromptCache.pictures` makes it.

    Attributes:
        keys: What tells pictures apart, one for each.
        pixels: Pixel values (3, S, S) of those whose visual tokens are not kept.
        tokens: Visual tokens (image_seq_length, width) of the others.
    """

    keys: tuple[bytes, ...]
    pixels: dict[bytes, Tensor]
    tokens: dict[bytes, Tensor]


@dataclass(eq=False)
class _Conversation:
    """Tokens whose keys and values a cache holds; those of pictures are the pictures' keys."""

    tokens: list[int | bytes]
    cache: Cache

    def copy(self) -> _Conversation:
        """Another one with the same keys and values, in the same memory: a dynamic cache never writes into it."""
        cache = copy.copy(self.cache)
        cache.layers = [copy.copy(layer) for layer in cache.layers]
        return _Conversation(self.tokens, cache)


class PromptCache:
    """Generates answers to one prompt at a time, and computes nothing twice that it keeps.

    Tokens are compared one by one and pictures by their content, so that a conversation may be changed anywhere: what
    is kept behind the change is cropped. The least recently used conversations and pictures make room for new ones.
    Answers are those of `model.generate`, to rounding: keys and values of a prompt that is computed in two parts may
    differ in the last digit. Methods may be called from any thread.

    Args:
        model: Generates. Language models whose cache cannot be cropped (with sliding windows, for example) work, and
            nothing of their conversations is kept.
        image_processor: Makes its pixel values.
        kept_tokens: Tokens of all conversations together to keep, the one that is generated among them; 0 for none.
            A token takes 2 x layers x key and value heads x head width numbers: 0.5 MB with Vicuna-7B in 16 bits.
        kept_pictures: Pictures whose visual tokens to keep.
        compiled: Compile the steps behind the first token, with CUDA graphs on a GPU. Answers come one at a time, one
            conversation is kept, and the first answer takes longer, as does the first of 2, 4 ... times its length.

    Attributes:
        reused_tokens: Of the latest prompt, those that were not computed.
        encoded_pictures: Of the latest prompt, those that went through the vision tower.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        image_processor: Any,
        *,
        kept_tokens: int,
        kept_pictures: int = 16,
        compiled: bool = False,
    ) -> None:
        for name, value in (("kept_tokens", kept_tokens), ("kept_pictures", kept_pictures)):
            if value < 0:
                raise ConfigError(f"{name}={value}: expected 0 (keep none) or more")
        self.reused_tokens = self.encoded_pictures = 0
        self._model, self._image_processor = model, image_processor
        self._kept_tokens, self._kept_pictures = kept_tokens, kept_pictures
        self._conversations: list[_Conversation] = []  # the least recently used in front
        self._features: OrderedDict[bytes, Tensor] = OrderedDict()  # likewise
        self._lock = threading.Lock()
        # CUDA graphs belong to the thread that recorded them
        self._worker = ThreadPoolExecutor(1, "generate") if compiled else None
        self._static: StaticCache | None = None

    def pictures(self, images: Sequence[Any]) -> Pictures:
        """Looks up the pictures of a prompt, and prepares those that are not kept.

        Args:
            images: As the processor takes them. Arrays and tensors are prepared in any case.

        Raises:
            ImageError: If a picture cannot be used.
        """
        keys, pixels, tokens = [], {}, {}
        for image in map(fetch_image, images):
            key = _content(image)
            kept = None if key is None else self._kept_features(key)
            if kept is None and (key is None or key not in pixels):
                values = self._image_processor(images=[image], return_tensors="pt")["pixel_values"][0]
                key = key or hashlib.sha256(values.numpy().tobytes()).digest()
                pixels[key] = values
            elif kept is not None:
                tokens[key] = kept
            keys.append(key)
        return Pictures(tuple(keys), pixels, tokens)

    def generate(
        self, input_ids: Tensor, *, pictures: Pictures, generation_config: GenerationConfig, **options: Any
    ) -> Tensor:
        """Generates as `model.generate` does.

        Args:
            input_ids: (1, N), with `image_seq_length` image tokens for each picture.
            pictures: Of the prompt.
            generation_config: Settings.
            **options: For `model.generate`: streamer, stopping_criteria ...

        Returns:
            Prompt and answer, (1, M).

        Raises:
            torch.OutOfMemoryError: If memory does not suffice; nothing is kept then.
        """
        try:
            if self._worker is None:
                return self._generate(input_ids, pictures, generation_config, options)
            return self._worker.submit(self._generate, input_ids, pictures, generation_config, options).result()
        except torch.OutOfMemoryError:
            self.clear()
            raise

    def clear(self) -> None:
        """Forgets all conversations and pictures."""
        with self._lock:
            self._conversations.clear()
            self._features.clear()

    @torch.inference_mode()
    def _generate(
        self, input_ids: Tensor, pictures: Pictures, config: GenerationConfig, options: dict[str, Any]
    ) -> Tensor:
        tokens = self._named(input_ids[0].tolist(), pictures.keys)
        conversation = self._begin(tokens, config.max_new_tokens or 0)
        self.reused_tokens = len(conversation.tokens)
        features = self._encode(pictures, self._count_pictures(conversation.tokens))
        if features:
            encoded = BaseModelOutputWithPooling(pooler_output=features)
            options = {**options, "mm_encoder_outputs": {"image": encoded}}
        if self._worker is not None:
            config = copy.copy(config)
            config.compile_config = _compilation(self._model.device)
        ids = self._model.generate(
            input_ids=input_ids,
            attention_mask=torch.ones_like(input_ids),
            past_key_values=conversation.cache,
            generation_config=config,
            **options,
        )
        conversation.tokens = tokens + ids[0, len(tokens) :].tolist()
        self._keep(conversation)
        return ids

    def _named(self, ids: list[int], keys: Sequence[bytes]) -> list[int | bytes]:
        """The tokens of a prompt, with those of pictures told apart."""
        length = self._model.config.image_seq_length
        visual = itertools.chain.from_iterable(itertools.repeat(key, length) for key in keys)
        return [next(visual) if token == self._model.config.image_token_id else token for token in ids]

    def _count_pictures(self, tokens: Sequence[int | bytes]) -> int:
        return sum(isinstance(token, bytes) for token in tokens) // self._model.config.image_seq_length

    def _begin(self, tokens: list[int | bytes], new_tokens: int) -> _Conversation:
        """The kept conversation that starts most like these tokens, cropped to what they share, or an empty one."""
        if self._worker is not None:
            return self._begin_static(tokens, len(tokens) + new_tokens)
        with self._lock:
            best = max(self._conversations, key=lambda kept: self._shared(kept, tokens), default=None)
            shared = 0 if best is None else self._shared(best, tokens)
            needed = len(tokens) + new_tokens
            if shared and (shared == len(best.tokens) or self._total() + needed > self._kept_tokens):
                self._conversations.remove(best)
            elif shared:  # another conversation that only starts alike, or one that was changed: it may come back
                best = best.copy()
            while self._conversations and self._total() + needed > self._kept_tokens:
                del self._conversations[0]
            if not shared:
                return _Conversation([], DynamicCache(config=self._model.config.get_text_config()))
            return self._cropped(best, shared)

    def _begin_static(self, tokens: list[int | bytes], needed: int) -> _Conversation:
        """Likewise, in the one static cache. Where it is too small, a larger one takes its place, for which the steps
        are compiled anew: every token attends over all of its places."""
        with self._lock:
            kept = self._conversations.pop() if self._conversations else None
            if self._static is None or needed > self._static.get_max_length():
                config = self._model.config.get_text_config()
                places = min(max(_LEAST_PLACES, 2 ** (needed - 1).bit_length()), config.max_position_embeddings)
                self._static, kept = StaticCache(config=config, max_cache_len=places), None
            kept = kept or _Conversation([], self._static)
            return self._cropped(kept, self._shared(kept, tokens))

    def _shared(self, kept: _Conversation, tokens: Sequence[int | bytes]) -> int:
        """How many tokens from the start are the same; whole pictures only, and never all, since one must be run."""
        pairs = zip(kept.tokens, tokens[:-1], strict=False)
        shared = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))
        visual = sum(isinstance(token, bytes) for token in tokens[:shared])
        return shared - visual % self._model.config.image_seq_length

    def _cropped(self, kept: _Conversation, length: int) -> _Conversation:
        if isinstance(kept.cache, DynamicCache):
            kept.cache.crop(length - len(kept.tokens))
        elif length == 0:
            kept.cache.reset()
        else:
            for layer in kept.cache.layers:
                layer.cumulative_length.fill_(length)  # what lies behind is masked, and written over
        kept.tokens = kept.tokens[:length]
        return kept

    def _total(self) -> int:
        return sum(len(kept.tokens) for kept in self._conversations)

    def _keep(self, conversation: _Conversation) -> None:
        cache = conversation.cache
        conversation.tokens = conversation.tokens[: int(cache.get_seq_length())]  # the last one was not run
        with self._lock:
            croppable = all(type(layer) in (DynamicLayer, StaticLayer) for layer in cache.layers)
            if croppable and len(conversation.tokens) <= self._kept_tokens - self._total():
                self._conversations.append(conversation)

    def _kept_features(self, key: bytes) -> Tensor | None:
        with self._lock:
            if key in self._features:
                self._features.move_to_end(key)
            return self._features.get(key)

    def _encode(self, pictures: Pictures, first: int) -> tuple[Tensor, ...]:
        """Visual tokens of the pictures from `first` on."""
        keys = pictures.keys[first:]
        missing = [key for key in dict.fromkeys(keys) if key in pictures.pixels]
        self.encoded_pictures = len(missing)
        tokens = dict(pictures.tokens)
        if missing:
            pixels = torch.stack([pictures.pixels[key] for key in missing]).to(self._model.device)
            tokens |= zip(missing, self._model.get_image_features(pixels).pooler_output, strict=True)
        with self._lock:
            for key in missing:
                # Its own memory: a row of a batch would keep the whole batch
                self._features[key] = tokens[key].clone() if len(missing) > 1 else tokens[key]
                while len(self._features) > self._kept_pictures:
                    self._features.popitem(last=False)
        return tuple(tokens[key] for key in keys)


def picture_key(image: Image.Image) -> bytes:
    """What tells a picture from others.

    Raises:
        OSError, SyntaxError, ValueError: If it is broken.
    """
    return hashlib.sha256(repr((image.mode, image.size, image.getpalette())).encode() + image.tobytes()).digest()


def _content(image: Any) -> bytes | None:
    """The key of a picture; None for what is no picture yet, or a broken one."""
    try:
        return picture_key(image) if isinstance(image, Image.Image) else None
    except (OSError, SyntaxError, ValueError):
        return None


def _compilation(device: torch.device) -> CompileConfig:
    if device.type == "cuda":
        return CompileConfig(dynamic=False)  # its mode "reduce-overhead" records CUDA graphs
    config = CompileConfig(dynamic=False, mode="default")
    config._compile_all_devices = True  # transformers compiles on accelerators by itself
    return config
