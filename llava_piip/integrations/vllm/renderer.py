"""From requests to the token ids that the model was trained with."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Any

from vllm.renderers import ChatParams
from vllm.renderers.hf import HfRenderer

from llava_piip.conversation import IMAGE_TAG, encode_prompt
from piip_core.errors import UserError

__all__ = ["PIIPLlavaRenderer"]


class PIIPLlavaRenderer(HfRenderer):
    """vLLM's renderer of chat templates, with our tokenization in place of the tokenizer's own.

    LLaVA tokenizes the text between two images by itself, which gives other ids than the text as a whole.
    """

    def render_messages(self, messages: list[Any], params: ChatParams) -> tuple[list[Any], Any]:
        """The prompt of a conversation: the chat template of the model's folder, parts of a message in their order."""
        return super().render_messages(messages, _in_parts(params))

    async def render_messages_async(self, messages: list[Any], params: ChatParams) -> tuple[list[Any], Any]:
        """See `render_messages`."""
        return await super().render_messages_async(messages, _in_parts(params))

    def tokenize_prompt(self, prompt: Any, params: Any) -> Any:
        """A prompt with the ids of our processor, but one image token per image.

        Raises:
            UserError: If images and their places do not match.
        """
        return super().tokenize_prompt(self._encoded(prompt), params)

    async def tokenize_prompt_async(self, prompt: Any, params: Any) -> Any:
        """See `tokenize_prompt`."""
        return await super().tokenize_prompt_async(await asyncio.to_thread(self._encoded, prompt), params)

    def _encoded(self, prompt: Any) -> Any:
        if "prompt_embeds" in prompt:
            return prompt
        count = self._count_images(prompt)
        image_token, vocab_size = self._hf_config.image_token_index, self._hf_config.text_config.vocab_size
        ids = prompt.get("prompt_token_ids")
        if ids is None:
            text = prompt["prompt"]
            ids = encode_prompt(
                self.get_tokenizer(), text, image_token_id=image_token, image_seq_length=1, has_images=count > 0
            )
        if ids.count(image_token) != count:
            raise UserError(
                f"the prompt has {ids.count(image_token)} {IMAGE_TAG} for {count} images: write one where each image "
                "belongs"
            )
        if outside := [token for token in ids if token >= vocab_size and token != image_token]:
            raise UserError(f"token id {outside[0]} has no row in the embedding table of {vocab_size}: leave it out")
        return {**prompt, "prompt_token_ids": ids}

    @property
    def _hf_config(self) -> Any:
        return self.model_config.hf_config

    def _count_images(self, prompt: Any) -> int:
        data = prompt.get("multi_modal_data")
        if not data:
            return 0
        return self.get_mm_processor().info.parse_mm_data(data).get_all_counts().get("image", 0)


def _in_parts(params: ChatParams) -> ChatParams:
    """Our templates take lists of parts, which vLLM does not recognise by their text."""
    if params.chat_template_content_format == "auto":
        params = replace(params, chat_template_content_format="openai")
    return replace(params, chat_template_kwargs={**params.chat_template_kwargs, "tokenize": False})
