"""From requests to the token ids that the model was trained with."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

from vllm.exceptions import VLLMValidationError
from vllm.renderers import ChatParams
from vllm.renderers.hf import HfRenderer

from llava_piip.conversation import IMAGE_TAG, TEXT_TAG, encode_prompt


class PIIPLlavaRenderer(HfRenderer):
    """vLLM's renderer of chat templates, with our tokenization in place of the tokenizer's own.

    LLaVA tokenizes the text between two images by itself, which gives other ids than the text as a whole. In messages
    an image is where a part is one; `<image>` in their texts is text.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # One thread: vLLM's tokenizer copies itself, slowly, for each one that uses it at the same time
        self._encoder = ThreadPoolExecutor(1, "encode_prompt")

    def render_messages(self, messages: list[Any], params: ChatParams) -> tuple[list[Any], Any]:
        """Messages and prompt of a conversation, by the chat template of the model's folder."""
        conversation, prompt = super().render_messages(_swapped(messages, IMAGE_TAG, TEXT_TAG), _in_parts(params))
        return _swapped(conversation, TEXT_TAG, IMAGE_TAG), prompt

    async def render_messages_async(self, messages: list[Any], params: ChatParams) -> tuple[list[Any], Any]:
        """See `render_messages`."""
        conversation, prompt = await super().render_messages_async(
            _swapped(messages, IMAGE_TAG, TEXT_TAG), _in_parts(params)
        )
        return _swapped(conversation, TEXT_TAG, IMAGE_TAG), prompt

    def tokenize_prompt(self, prompt: Any, params: Any) -> Any:
        """A prompt with the ids of our processor, but one image token per image.

        Raises:
            VLLMValidationError: If images and placeholders do not match, or ids have no row in the embedding.
        """
        return self._checked(super().tokenize_prompt(self._encoded(prompt), params))

    async def tokenize_prompt_async(self, prompt: Any, params: Any) -> Any:
        """See `tokenize_prompt`."""
        encoded = await asyncio.get_running_loop().run_in_executor(self._encoder, self._encoded, prompt)
        return self._checked(await super().tokenize_prompt_async(encoded, params))

    def _encoded(self, prompt: Any) -> Any:
        if "prompt_token_ids" in prompt or "prompt_embeds" in prompt:
            return prompt
        ids = encode_prompt(
            self.get_tokenizer(),
            prompt["prompt"],
            image_token_id=self.model_config.hf_config.image_token_index,
            image_seq_length=1,
            has_images=self._count_images(prompt) > 0,
        )
        return {**prompt, "prompt": prompt["prompt"].replace(TEXT_TAG, IMAGE_TAG), "prompt_token_ids": ids}

    def _checked(self, prompt: Any) -> Any:
        ids, images = prompt.get("prompt_token_ids") or [], self._count_images(prompt)
        config = self.model_config.hf_config
        image_token, rows = config.image_token_index, config.text_config.vocab_size
        if (found := ids.count(image_token)) != images:
            raise VLLMValidationError(
                f"the prompt has {found} {IMAGE_TAG} for {images} images: write one where each image belongs, and "
                "leave truncation off"
            )
        if outside := [token for token in ids if token >= rows and token != image_token]:
            raise VLLMValidationError(f"token id {outside[0]} is out of vocabulary: expected ids below {rows}")
        return prompt

    def _count_images(self, prompt: Any) -> int:
        data = prompt.get("multi_modal_data")
        return self.get_mm_processor().info.parse_mm_data(data).get_all_counts().get("image", 0) if data else 0


def _in_parts(params: ChatParams) -> ChatParams:
    """Our templates take lists of parts, which vLLM does not recognise by their text."""
    if params.chat_template_content_format == "auto":
        params = replace(params, chat_template_content_format="openai")
    return replace(params, chat_template_kwargs={**params.chat_template_kwargs, "tokenize": False})


def _swapped(value: Any, old: str, new: str) -> Any:
    """Messages with another word in all their texts."""
    if isinstance(value, str):
        return value.replace(old, new)
    if isinstance(value, Mapping):
        return {key: _swapped(item, old, new) for key, item in value.items()}
    if isinstance(value, (list, tuple, Iterator)):  # parts may be pydantic's iterators, which can be read once
        return [_swapped(item, old, new) for item in value]
    return value
