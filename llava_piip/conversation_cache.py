"""Keys and values of the latest conversation, so that the next question computes only what is new."""

from __future__ import annotations

import hashlib
import inspect
import threading
from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate, chain, repeat
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, GenerationConfig, GenerationMixin, PreTrainedModel


class ConversationCache:
    """Generates as `model.generate` does, and keeps what it computed of one conversation.

    Tokens are compared one by one and images by their pixels, so that a conversation may be changed anywhere: what is
    kept after the change is cropped. Answers are those without a cache, to rounding: in 16 bits a prompt that is
    computed in two parts may differ in the last digit. Threads may generate at once; what the last of them did stays.

    Args:
        model: A `PIIPLlavaForConditionalGeneration`.

    Attributes:
        reused_tokens: Of the latest prompt, those that were not computed.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.reused_tokens = 0
        self._model = model
        self._lock = threading.Lock()
        self._kept: tuple[list[int | bytes], DynamicCache | None] = [], None

    @torch.inference_mode()
    def generate(
        self,
        ids: Sequence[int],
        pixel_values: Tensor | None,
        generation_config: GenerationConfig,
        *,
        image_sizes: Tensor | None = None,
        **options: Any,
    ) -> Tensor:
        """Prompt and answer (1, M), as of `model.generate`, which takes the settings and other options.

        Args:
            ids: The prompt, with the image tokens of each image.
            pixel_values: Of all its images (N, 3, S, S); None for none.
            generation_config: Settings.
            image_sizes: Their sizes (N, 2) where they keep their aspect ratio.
            **options: Streamer, stopping criteria ...
        """
        config, device = self._model.config, self._model.device
        lengths = [] if pixel_values is None else config.image_lengths(pixel_values, image_sizes)
        tokens = self._name_tokens(ids, pixel_values, image_sizes, lengths)
        with self._lock:  # for one caller alone: two must not write into the same cache
            (kept, cache), self._kept = self._kept, ([], None)
        shared = min(len(kept), len(tokens) - 1)  # never all of a prompt, because one must be run
        shared = next((i for i in range(shared) if kept[i] != tokens[i]), shared)
        seen, ends = sum(isinstance(token, bytes) for token in tokens[:shared]), [0, *accumulate(lengths)]
        images = bisect_right(ends, seen) - 1
        shared -= seen - ends[images]  # whole images
        if not shared:
            cache = DynamicCache()  # without the configuration no layer drops what lies before a sliding window
        elif shared < len(kept):
            cache.crop(shared - len(kept))
        self.reused_tokens = shared
        if pixel_values is not None and images < len(pixel_values):
            options["pixel_values"] = pixel_values[images:].to(device, self._model.dtype)
            if image_sizes is not None:
                options["image_sizes"] = image_sizes[images:]
        input_ids = torch.tensor([list(ids)], device=device)
        output = self._model.generate(
            input_ids=input_ids,
            attention_mask=torch.ones_like(input_ids),
            generation_config=generation_config,
            **{_cache_argument(): cache},
            **options,
        )
        tokens += output[0, len(ids) :].tolist()
        with self._lock:
            self._kept = tokens[: int(cache.get_seq_length())], cache  # the last token was not run
        return output

    def _name_tokens(
        self, ids: Sequence[int], pixel_values: Tensor | None, image_sizes: Tensor | None, lengths: Sequence[int]
    ) -> list[int | bytes]:
        """The prompt's tokens, those of an image replaced by what tells it from others."""
        images = [] if pixel_values is None else pixel_values.cpu()
        if image_sizes is not None:  # the padding depends on the other images
            images = [image[:, :height, :width] for image, (height, width) in zip(images, image_sizes, strict=True)]
        keys = (hashlib.sha256(image.numpy().tobytes()).digest() for image in images)
        visual = chain.from_iterable(map(repeat, keys, lengths))
        return [next(visual) if token == self._model.config.image_token_id else token for token in ids]


def _cache_argument() -> str:
    """What `generate` calls its cache: `cache` from transformers 5.24 on, `past_key_values` before.

    Seen working with transformers 5.16 to 5.24; the tests of this file fail if another version calls it otherwise.
    """
    parameters = inspect.signature(GenerationMixin.prepare_inputs_for_generation).parameters
    return "cache" if "cache" in parameters else "past_key_values"
