"""From conversations to token ids and labels, with exact masks."""

from __future__ import annotations

import threading
from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import repeat
from typing import Any

from jinja2.exceptions import TemplateError
from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from piip_core.errors import ConfigError, UserError

from .chat_templates import marks_answers, resolve_chat_template
from .tokenization import bos_ids, encode_text

IGNORE_INDEX = -100
IMAGE_TAG = "<image>"
# Stands for the tag where it is text: of the same length, with a character that Unicode keeps for such inner uses
TEXT_TAG = "\ufdd0image>"

_RENDERING = threading.Lock()  # transformers notes the spans of answers in the template, which all threads share

_ROLES = {"human": "user", "gpt": "assistant"}

Messages = Sequence[Mapping[str, Any]]


class ConversationError(UserError):
    """A conversation that cannot be used; the message names the turn and the fix."""


@dataclass(frozen=True)
class EncodedConversation:
    """A conversation as a model is trained with it.

    Attributes:
        input_ids: Ids from bos on; an image is `image_seq_length` times the id of the image token.
        labels: The same ids where they are supervised, elsewhere `IGNORE_INDEX`.
        num_images: Images in `input_ids`. After a cut these are the first ones of the conversation.
        turns_cut: Rounds (question and answer) dropped from the end to fit the maximum length.
    """

    input_ids: list[int]
    labels: list[int]
    num_images: int
    turns_cut: int = 0


def messages_from_llava(conversations: Sequence[Mapping[str, str]], *, has_image: bool) -> list[dict[str, str]]:
    """Messages of a LLaVA record, with its placeholder rule.

    If the record has an image, a message that contains `<image>` gets one tag and a newline in front, and loses all
    others. Otherwise the tag is ordinary text. A `gpt` turn at the very start (a greeting) is left out, as in LLaVA.

    Raises:
        ConversationError: For turns of another role, roles that do not alternate, or no question.
    """
    messages: list[dict[str, str]] = []
    for number, turn in enumerate(conversations, 1):
        if turn["from"] not in _ROLES:
            raise ConversationError(f"turn {number} is from {turn['from']!r}, expected 'human' or 'gpt'")
        role, text = _ROLES[turn["from"]], turn["value"]
        if messages and messages[-1]["role"] == role:
            raise ConversationError(
                f"turn {number} is from {turn['from']!r} like the turn before it: 'human' and 'gpt' must alternate "
                "(join the two turns, or remove one)"
            )
        if has_image and IMAGE_TAG in text:
            text = f"{IMAGE_TAG}\n{text.replace(IMAGE_TAG, '').strip()}".strip()
        messages.append({"role": role, "content": text})
    if messages and messages[0]["role"] == "assistant":
        del messages[0]
    if not messages:
        raise ConversationError("no turn from 'human': a conversation needs a question")
    return messages


def protect_text(messages: Messages) -> Messages:
    """Makes sure that only image parts of messages become placeholders.

    Where messages have image parts, `<image>` in any text (of a user, or of a model that answered) is text; it is
    written so that `encode_prompt` and `encode_conversation` know. Messages of strings alone stay as they are: in
    LLaVA's data the tag in a string is the placeholder.

    Raises:
        ConversationError: For messages of another form.
    """
    for message in messages:
        if not isinstance(message, Mapping):
            raise ConversationError(f"message {message!r}: messages should be dicts with role and content")
        content = message.get("content")
        if content is not None and not isinstance(content, (str, list, tuple)):
            raise ConversationError(f"a message has the content {content!r}: expected text or a list of parts")
        for part in () if isinstance(content, str) else content or ():
            if not isinstance(part, Mapping):
                raise ConversationError(f"a content part is {part!r}: expected {{'type': 'text', 'text': ...}}")
    if not has_image_parts(messages):
        return messages
    return [{**message, "content": _protected(message.get("content"))} for message in messages]


def _protected(content: Any) -> Any:
    if isinstance(content, str):
        return content.replace(IMAGE_TAG, TEXT_TAG)
    return [{**part, "text": _protected(part["text"])} if "text" in part else part for part in content or ()]


def has_image_parts(messages: Messages) -> bool:
    """Whether any message has an image among its parts."""
    contents = (message.get("content") for message in messages if isinstance(message, Mapping))
    parts = (part for content in contents if isinstance(content, (list, tuple)) for part in content)
    # image_url: OpenAI's word, which transformers translates
    return any(isinstance(part, Mapping) and part.get("type") in ("image", "image_url") for part in parts)


def render_conversation(
    messages: Messages,
    *,
    chat_template: str,
    tokenizer: PreTrainedTokenizerBase | None = None,
    add_generation_prompt: bool = False,
) -> tuple[str, list[tuple[int, int]]]:
    """The prompt of a conversation, and which of its characters are supervised.

    Args:
        messages: {"role": "system", "user" or "assistant", "content": text or parts}; images are parts {"type":
            "image"}, or `<image>` in strings; see `protect_text`.
        chat_template: A name in `CHAT_TEMPLATES` or a Jinja template with `{% generation %}` blocks.
        tokenizer: Gives its special tokens to the template; without it a template uses those of Llama.
        add_generation_prompt: Whether the prompt ends where the next answer starts.

    Returns:
        The text, and the first character and the one after the last of each supervised part.

    Raises:
        ConversationError: If the template does not take these messages.
        ConfigError: For an unknown template, or a tokenizer without the end token that the template writes.
    """
    protected = list(protect_text(messages))
    template = resolve_chat_template(chat_template)
    if tokenizer is not None and tokenizer.eos_token is None and "eos_token" in template:
        raise ConfigError(f"chat_template {chat_template!r} ends answers with eos_token, which the tokenizer lacks")
    try:
        with _RENDERING:
            (text,), (spans,) = render_jinja_template(
                [protected],
                chat_template=template,
                return_assistant_tokens_mask=True,
                add_generation_prompt=add_generation_prompt,
                **(tokenizer.special_tokens_map if tokenizer is not None else {}),
            )
    except TemplateError as error:
        raise ConversationError(str(error)) from error
    return text, spans


def encode_prompt(tokenizer: PreTrainedTokenizerBase, text: str, **settings: Any) -> list[int]:
    """Ids of a rendered prompt, as `encode_rendered` gives them, whose settings it takes."""
    return encode_rendered(tokenizer, text, (), **settings).input_ids


def encode_rendered(
    tokenizer: PreTrainedTokenizerBase,
    text: str,
    spans: Sequence[tuple[int, int]],
    *,
    image_token_id: int,
    image_seq_length: int | Iterable[int],
    has_images: bool = True,
) -> EncodedConversation:
    """Ids and labels of what `render_conversation` gives: bos in front and every `<image>` expanded.

    Args:
        tokenizer: A fast tokenizer.
        text: The prompt.
        spans: The supervised parts of it.
        image_token_id: Id that stands for a piece of an image.
        image_seq_length: Number of them per image, or of each image in turn.
        has_images: Whether `<image>` stands for an image; otherwise it is ordinary text.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ConversationError(
            f"the text has half of a character (a lone surrogate) after {text[: error.start][-30:]!r}: remove it"
        ) from None
    supervised = bytearray(len(text))
    for start, end in spans:
        supervised[start:end] = b"\1" * (end - start)

    input_ids = bos_ids(tokenizer)
    if input_ids and text.startswith(tokenizer.bos_token):  # the template has written it
        input_ids = []
    labels = [IGNORE_INDEX] * len(input_ids)
    chunks = text.split(IMAGE_TAG) if has_images else [text]
    lengths = repeat(image_seq_length) if isinstance(image_seq_length, int) else iter(image_seq_length)
    position = 0
    for index, chunk in enumerate(chunks):
        if index:
            length = next(lengths)
            input_ids += [image_token_id] * length
            labels += [IGNORE_INDEX] * length
            position += len(IMAGE_TAG)
        ids, offsets = encode_text(tokenizer, chunk.replace(TEXT_TAG, IMAGE_TAG), literals=(IMAGE_TAG,))
        if image_token_id in ids:
            name = tokenizer.convert_ids_to_tokens(image_token_id)
            raise ConversationError(
                f"the text contains {name!r}, which has the id of the image token ({image_token_id}): "
                f"images are written {IMAGE_TAG}; remove {name!r} from the text"
            )
        input_ids += ids
        labels += [
            token if any(supervised[position + start : position + end]) else IGNORE_INDEX
            for token, (start, end) in zip(ids, offsets, strict=True)
        ]
        position += len(chunk)
    return EncodedConversation(input_ids, labels, num_images=len(chunks) - 1)


def encode_conversation(
    tokenizer: PreTrainedTokenizerBase,
    messages: Messages,
    *,
    chat_template: str,
    max_length: int | None = None,
    **settings: Any,
) -> EncodedConversation:
    """Ids and labels of a conversation; supervised is exactly what the template marks, found by position.

    The text between two images is tokenized by itself, as in LLaVA. A conversation longer than `max_length` loses whole
    rounds from its end, and `turns_cut` says how many.

    Args:
        tokenizer: A fast tokenizer.
        messages: See `render_conversation`.
        chat_template: See `render_conversation`.
        max_length: Most ids, with bos and those of images.
        **settings: Those of `encode_rendered`.

    Raises:
        ConversationError: If the template does not take these messages, not even the first round fits, no token is
            supervised, or ordinary text contains the image token.
        ConfigError: For an unknown template, one that does not mark answers, or a tokenizer without its end token.
    """
    if not messages:
        raise ConversationError("the conversation has no messages: nothing to train on")
    if not marks_answers(resolve_chat_template(chat_template)):
        raise ConfigError("the chat template has no {% generation %} block: put one around what is supervised")

    def encode(count: int) -> EncodedConversation:
        rendered = render_conversation(messages[:count], chat_template=chat_template, tokenizer=tokenizer)
        return encode_rendered(tokenizer, *rendered, **settings)

    encoded = encode(len(messages))
    if max_length is not None and len(encoded.input_ids) > max_length:
        starts = [index for index, message in enumerate(messages) if message.get("role") == "user"]
        ends = [*starts[1:], len(messages)]  # of the rounds; a system message is a part of the first
        kept = bisect_right(ends, max_length, key=lambda end: len(encode(end).input_ids))
        if not kept:
            first = encode(ends[0])
            raise ConversationError(
                f"the first round has {len(first.input_ids)} tokens with its {first.num_images} images, max_length is "
                f"{max_length}: raise it or shorten the round"
            )
        encoded = replace(encode(ends[kept - 1]), turns_cut=len(ends) - kept)
    if all(label == IGNORE_INDEX for label in encoded.labels):
        cut = f" in what is left after cutting {encoded.turns_cut} rounds" if encoded.turns_cut else ""
        raise ConversationError(f"no token to train on{cut}: the conversation needs an answer that is not empty")
    return encoded
