"""The processor: prompts and images to what the model takes."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

import torch
from transformers import BatchFeature, ProcessorMixin
from transformers.image_utils import load_image

from piip_core.errors import ConfigError, UserError

from .chat_templates import resolve_chat_template
from .configuration import count_tokens
from .conversation import (
    IGNORE_INDEX,
    IMAGE_TAG,
    EncodedConversation,
    Messages,
    encode_conversation,
    encode_prompt,
    encode_rendered,
    has_image_parts,
    protect_text,
    render_conversation,
)
from .image_processing import ImageError
from .tokenization import keep_legacy_setting


class PIIPLlavaProcessor(ProcessorMixin):
    """Tokenizer and image processor of one model.

    Args:
        image_processor: Makes the pixel values.
        tokenizer: A fast tokenizer that has the special token `<image>`; see `add_image_token`.
        image_seq_length: Visual tokens per image, `PIIPLlavaConfig.image_seq_length`.
        token_size: Where images keep their aspect ratio, `PIIPLlavaConfig.token_size`, which their tokens follow from.
        image_newline: Whether each row of them ends with one more, `PIIPLlavaConfig.projector_newline`.
        chat_template: A name in `CHAT_TEMPLATES` or a Jinja template; that of the model's training.

    Raises:
        ConfigError: If the tokenizer has no image token.
    """

    def __init__(
        self,
        image_processor: Any = None,
        tokenizer: Any = None,
        image_seq_length: int | None = None,
        chat_template: str | None = None,
        token_size: int | None = None,
        image_newline: bool = False,
        **kwargs: Any,
    ) -> None:
        if image_seq_length is None or image_seq_length < 1:
            raise ConfigError(f"image_seq_length={image_seq_length}: expected the model's config.image_seq_length")
        self.image_seq_length, self.token_size, self.image_newline = image_seq_length, token_size, image_newline
        self.image_token = IMAGE_TAG  # as transformers' processors call it
        self.image_token_id = tokenizer.get_added_vocab().get(IMAGE_TAG)
        if self.image_token_id is None:
            hint = "llava_piip.assembly.add_image_token(tokenizer) adds it"
            raise ConfigError(f"the tokenizer has no special token {IMAGE_TAG}: {hint}")
        super().__init__(image_processor, tokenizer, chat_template=resolve_chat_template(chat_template or "vicuna_v1"))

    def __call__(
        self,
        images: Any = None,
        text: str | Sequence[str] | None = None,
        *,
        padding: bool | str = True,
        padding_side: str = "left",
        max_length: int | None = None,
        return_tensors: str | None = "pt",
        **kwargs: Any,
    ) -> BatchFeature:
        """Inputs for the model, for generation by default: padded on the left.

        Args:
            images: One image, a list, or a list of lists (one per text); as many as `<image>` in the texts, in order.
                A string is the address or the file of an image. Without images, `<image>` is ordinary text.
            text: One prompt or several.
            padding: Pad to the longest; False needs prompts of equal length.
            padding_side: "left" or "right".
            max_length: Longest prompt to accept, visual tokens included. Prompts are never cut.
            return_tensors: "pt", or None for lists of ids; pixels are a tensor in any case.
            **kwargs: Settings of the image processor for this call.

        Returns:
            `input_ids` and `attention_mask` (B, N), and with images `pixel_values` (number of images, 3, S, S), and
            `image_sizes` (number of images, 2) where they keep their aspect ratio.

        Raises:
            UserError: If images and placeholders do not match, a prompt is too long, or `truncation` is asked for.
            ImageError: If an image cannot be used.
            TypeError: For an unknown setting.
        """
        if kwargs.pop("truncation", None):
            raise UserError(
                "truncation=True: prompts are not cut, because half an image cannot be given to the model; shorten the "
                "text, or give max_length alone to refuse longer prompts"
            )
        known = self.image_processor.valid_kwargs.__annotations__
        kwargs = {name: value for name, value in kwargs.items() if value is not None}  # such as audio=None
        if unknown := sorted(set(kwargs) - set(known)):
            raise TypeError(f"{', '.join(unknown)}: no such setting; known: {', '.join(known)}")
        prompts = [text] if isinstance(text, str) else text
        if not isinstance(prompts, (list, tuple)) or not all(isinstance(prompt, str) for prompt in prompts):
            raise UserError(f"text={text!r}: expected a prompt or a list of prompts")
        per_prompt = _images_per_prompt(images, prompts)
        images = [_fetch_image(image) for found in per_prompt for image in found]
        seen = self.image_processor(images=images, return_tensors="pt", **kwargs) if images else {}
        sizes = iter(seen.get("image_sizes", ()))
        ids = [
            self.encode_prompt(prompt, len(found), list(islice(sizes, len(found))))
            for prompt, found in zip(prompts, per_prompt, strict=True)
        ]
        if max_length is not None and (longest := max(map(len, ids))) > max_length:
            raise UserError(
                f"a prompt has {longest} tokens, visual ones included; max_length is {max_length}: shorten it, prompts "
                "are not cut"
            )
        data = self.tokenizer.pad(
            {"input_ids": ids}, padding=padding, padding_side=padding_side, return_attention_mask=True
        )
        return BatchFeature({**data, **seen}, tensor_type=return_tensors)

    def apply_chat_template(
        self, conversation: Sequence[Any], chat_template: str | None = None, **options: Any
    ) -> str | list[str] | BatchFeature:
        """As transformers' processors do, with `<image>` in texts as text where messages have image parts.

        Returns:
            The prompt; with `tokenize` its ids, with `return_dict` what a call returns; `assistant_masks` (B, N) with
            `return_assistant_tokens_mask`.
        """
        if not conversation:
            raise UserError("conversation=[]: expected at least one message")
        is_batch = isinstance(conversation[0], (list, tuple))
        conversations = [
            # message objects as well, which some versions of transformers take for lists of messages
            protect_text([message if isinstance(message, Mapping) else vars(message) for message in messages])
            for messages in (conversation if is_batch else [conversation])
        ]
        # transformers' way to the masks differs from version to version
        has_masks = options.pop("return_assistant_tokens_mask", False) and options.get("return_dict")
        has_masks = has_masks and options.get("tokenize")
        result = super().apply_chat_template(conversations if is_batch else conversations[0], chat_template, **options)
        if has_masks:
            rows, sizes = [], iter(result.get("image_sizes", ()))
            for messages, attended in zip(conversations, result["attention_mask"], strict=True):
                mask = iter(self._assistant_mask(messages, chat_template, options, sizes))
                rows.append([next(mask) if is_token else 0 for is_token in attended])  # zeros for the padding
            is_tensor = isinstance(result["input_ids"], torch.Tensor)
            result["assistant_masks"] = torch.tensor(rows) if is_tensor else rows
        return result

    def _assistant_mask(
        self, messages: Messages, chat_template: str | None, options: Mapping[str, Any], sizes: Iterator[Any]
    ) -> list[int]:
        """1 for each id of a conversation that training would supervise, 0 for the others; takes its images' sizes."""
        rendered = render_conversation(
            messages,
            chat_template=chat_template or self.chat_template,
            tokenizer=self.tokenizer,
            add_generation_prompt=options.get("add_generation_prompt", False),
        )
        has_images = has_image_parts(messages)
        settings = self._image_tokens(islice(sizes, rendered[0].count(IMAGE_TAG) if has_images else 0))
        labels = encode_rendered(self.tokenizer, *rendered, **settings, has_images=has_images).labels
        return [int(label != IGNORE_INDEX) for label in labels]

    def _image_tokens(self, image_sizes: Iterable[Iterable[int]]) -> dict[str, Any]:
        lengths: int | list[int] = self.image_seq_length
        if self.token_size is not None:
            lengths = count_tokens(image_sizes, self.token_size, self.image_newline)
        return {"image_token_id": self.image_token_id, "image_seq_length": lengths}

    def encode_conversation(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        chat_template: str | None = None,
        max_length: int | None = None,
        has_images: bool = True,
        image_sizes: Iterable[Iterable[int]] = (),
    ) -> EncodedConversation:
        """Ids and labels for training; see `llava_piip.conversation.encode_conversation`.

        Where images keep their aspect ratio, `image_sizes` are those that the image processor gave.
        """
        return encode_conversation(
            self.tokenizer,
            messages,
            chat_template=chat_template or self.chat_template,
            max_length=max_length,
            has_images=has_images,
            **self._image_tokens(image_sizes),
        )

    def save_pretrained(self, save_directory: str | os.PathLike[str], **kwargs: Any) -> Any:
        """Writes everything that `from_pretrained` needs."""
        keep_legacy_setting(self.tokenizer)
        return super().save_pretrained(save_directory, **kwargs)

    def encode_prompt(self, prompt: str, num_images: int, image_sizes: Iterable[Iterable[int]] = ()) -> list[int]:
        """Ids of one prompt, for the case that its images need no processing; a call gives the same."""
        placeholders = prompt.count(IMAGE_TAG) if num_images else 0
        if placeholders != num_images:
            raise UserError(
                f"a prompt has {placeholders} {IMAGE_TAG} for {num_images} images: write one where each image belongs"
            )
        return encode_prompt(self.tokenizer, prompt, **self._image_tokens(image_sizes), has_images=num_images > 0)

    @property
    def model_input_names(self) -> list[str]:
        """Names of what a call returns."""
        return ["input_ids", "attention_mask", "pixel_values", *(["image_sizes"] if self.token_size else [])]


def _fetch_image(image: Any) -> Any:
    """The image behind an address or a file name; anything else as it is."""
    if not isinstance(image, (str, os.PathLike)):
        return image
    try:
        return load_image(os.fspath(image))
    except Exception as error:  # readers and clients meet what is broken with errors of many types
        raise ImageError(f"{os.fspath(image)[:200]}: no image could be read from there ({error})") from error


def _images_per_prompt(images: Any, prompts: Sequence[str]) -> list[list[Any]]:
    """Images of each prompt; a flat list is dealt out by the placeholders."""
    if isinstance(images, torch.Tensor) and images.ndim == 4:
        images = list(images)
    flat = list(images) if isinstance(images, (list, tuple)) else [] if images is None else [images]
    if flat and isinstance(flat[0], (list, tuple)):
        if len(flat) != len(prompts):
            raise UserError(f"{len(flat)} lists of images for {len(prompts)} prompts: give one list per prompt")
        return [[image for image in found if image is not None] for found in flat]
    counts = [prompt.count(IMAGE_TAG) if flat else 0 for prompt in prompts]
    if sum(counts) != len(flat):
        raise UserError(
            f"the prompts have {sum(counts)} {IMAGE_TAG} for {len(flat)} images: write one where each image belongs"
        )
    left = iter(flat)
    return [list(islice(left, count)) for count in counts]
