"""A trained model that answers: loading it, prompts, settings, batches of answers and streamed ones."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from peft import PeftModel
from torch import nn
from transformers import BatchFeature, GenerationConfig

from piip_core.errors import CheckpointError, ConfigError, UserError, check, check_choice
from piip_core.files import read_json

from .checkpoints import fetch_released
from .configuration import PIIPLlavaConfig
from .conversation import ConversationError, Messages, has_image_parts, render_conversation
from .conversation_cache import ConversationCache
from .loading import final_folder, is_trained_folder, load_trained
from .processing import PIIPLlavaProcessor
from .streaming import AnswerStream, answer_text

Quantization = Literal["4bit", "8bit"]

DEFAULT_NEW_TOKENS = 512
_LEAST_TEMPERATURE = 1e-20  # scores divided by much less overflow
QUANTIZATIONS = ("4bit", "8bit")
DTYPES = ("bfloat16", "float16", "float32")


class ContextLengthError(UserError):
    """Conversation and answer together are longer than the model's context."""


class MemoryLimitError(UserError):
    """The device has too little memory for what was asked."""


class ChatModel:
    """A model and its processor, ready to answer.

    Args:
        model: A `PIIPLlavaForConditionalGeneration`.
        processor: Its processor.

    Attributes:
        end_ids: Tokens that end an answer.
        end_texts: Texts that do, with templates that end answers with none of these tokens.
        cache: What `stream` keeps of the latest conversation.
    """

    def __init__(self, model: nn.Module, processor: PIIPLlavaProcessor) -> None:
        self.model = model.eval()
        self.processor = processor
        self.end_ids, self.end_texts = _ends(model, processor)
        self.cache = ConversationCache(model)

    @classmethod
    def load(
        cls,
        folder: str | Path,
        *,
        device: str | torch.device | None = None,
        dtype: str | torch.dtype = "auto",
        quantization: Quantization | None = None,
    ) -> ChatModel:
        """Loads what training saved or the converter wrote: a whole model, trained parts, or adapters.

        Args:
            folder: The folder, that of a finished run, or the name of a released model, see `zoo.released`.
            device: Where the model runs; None for the first GPU, or the CPU where there is none.
            dtype: A name in `DTYPES`, or "auto" for the precision of the file.
            quantization: Precision of the language model's linear layers; the vision tower keeps `dtype`.

        Raises:
            CheckpointError: If the folder holds no such model.
            ConfigError: If bitsandbytes is needed and not installed.
            UserError: For an unknown device, dtype or quantization.
        """
        if quantization is not None:
            check_choice("quantization", quantization, QUANTIZATIONS)
        if not isinstance(dtype, torch.dtype) and dtype != "auto":
            check_choice("dtype", dtype, ("auto", *DTYPES))
            dtype = getattr(torch, dtype)
        device, path = _device(device), model_folder(Path(folder))
        bits = int(quantization[0]) if quantization else 16
        if bits == 8:  # it would say for every layer and token that it casts to float16
            logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
        model, processor = load_trained(path, dtype=dtype, bits=bits, device_map={"": device})
        if isinstance(model, PeftModel):  # on quantised weights the adapters stay beside them
            model = model.merge_and_unload() if quantization is None else model.get_base_model()
        if quantization is None:
            model.to(device)  # vision tower and projector of trained parts are not placed by the loading
        try:
            return cls(model, processor)
        except ConversationError as error:  # renders a first conversation
            raise CheckpointError(f"{path}: its chat template (chat_template.jinja) cannot be used: {error}") from error

    @property
    def device(self) -> torch.device:
        """Where the inputs belong."""
        return self.model.device

    @property
    def context_length(self) -> int:
        """Most tokens of a conversation with its answer, visual ones included."""
        return self.model.config.get_text_config().max_position_embeddings

    def prompt(self, messages: Messages) -> str:
        """The text of a conversation whose last message is a question, up to where the answer starts.

        Raises:
            UserError: If the template does not take the messages.
        """
        template, tokenizer = self.processor.chat_template, self.processor.tokenizer
        return render_conversation(messages, chat_template=template, tokenizer=tokenizer, add_generation_prompt=True)[0]

    def encode(
        self, messages: Messages, images: Sequence[Any] = (), *, max_new_tokens: int = DEFAULT_NEW_TOKENS
    ) -> BatchFeature:
        """Inputs of a conversation whose last message is a question, on the model's device; see `stream`.

        Returns:
            `input_ids` and `attention_mask` (1, N), and with images `pixel_values` (and `image_sizes`).

        Raises:
            ContextLengthError: If conversation and answer do not fit into the context. Nothing is ever cut.
            UserError: If placeholders and images do not match, or the template does not take the messages.
        """
        if not images and has_image_parts(messages):  # in a text alone, the placeholder is ordinary text
            raise UserError("the messages have images, none is given: give them in the order of the messages")
        inputs = self.processor(text=[self.prompt(messages)], images=[list(images)])
        self.check_length(inputs["input_ids"].shape[1], max_new_tokens)
        return inputs.to(self.device)

    def check_length(self, length: int, max_new_tokens: int = 0) -> None:
        """Raises a `ContextLengthError` if a conversation of so many tokens leaves no room for its answer."""
        if length + max_new_tokens > self.context_length:
            raise ContextLengthError(
                f"the conversation has {length} tokens, visual ones included, and the answer may have "
                f"{max_new_tokens}; the model's context is {self.context_length}: shorten the conversation, give "
                "fewer images, or lower max_new_tokens; nothing is cut"
            )

    def generation_config(
        self, *, max_new_tokens: int = DEFAULT_NEW_TOKENS, temperature: float = 0.0, top_p: float = 1.0
    ) -> GenerationConfig:
        """Settings for `model.generate`, whatever the folder's own `generation_config.json` says about sampling."""
        check_sampling(max_new_tokens, temperature, top_p)
        sampled = temperature > 0
        return GenerationConfig(
            max_new_tokens=max_new_tokens,
            do_sample=sampled,
            temperature=float(temperature) if sampled else 1.0,
            top_p=float(top_p) if sampled else 1.0,
            top_k=0 if sampled else 50,  # 50 is transformers' default, with which it does not warn when not sampling
            eos_token_id=self.end_ids,
            pad_token_id=self.processor.tokenizer.pad_token_id,
        )

    def answer(self, conversations: Sequence[tuple[Messages, Sequence[Any]]], **settings: Any) -> list[str]:
        """Answers the last messages of conversations, each with its images, all at once.

        Settings and errors are those of `generate` and `encode`.
        """
        prompts = [self.prompt(messages) for messages, _ in conversations]
        inputs = self.processor(text=prompts, images=[list(images) for _, images in conversations])
        return self.generate(inputs, **settings)

    def generate(
        self,
        inputs: BatchFeature,
        *,
        max_new_tokens: int = DEFAULT_NEW_TOKENS,
        temperature: float = 0.0,
        top_p: float = 1.0,
        until: Sequence[str] = (),
        **others: Any,
    ) -> list[str]:
        """Answers of a batch, all at once; each is what it would be alone, without white space around it.

        Args:
            inputs: Of the processor, for one or more conversations.
            max_new_tokens: Most tokens of an answer; fewer where the context has less room.
            temperature: 0 takes the most probable token each time; with a higher one answers vary.
            top_p: Sample among the most probable tokens that together have this probability.
            until: Texts that end an answer and are no part of it, beside those of the template.
            **others: More settings of transformers' `GenerationConfig`, such as `num_beams`.

        Raises:
            ContextLengthError: If a conversation leaves no room for an answer.
            MemoryLimitError: If the batch does not fit into memory.
            UserError: For a setting that is unknown or cannot work.
        """
        settings = self.generation_config(
            max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p if temperature else 1.0
        )
        if unknown := settings.update(**others):
            raise UserError(f"{', '.join(unknown)}: no setting of transformers' GenerationConfig")
        ends = [*self.end_texts, *until]
        lengths = inputs["attention_mask"].sum(1).tolist()
        self.check_length(max(lengths), 1)
        limits = [min(max_new_tokens, self.context_length - length) for length in lengths]
        settings.update(max_new_tokens=max(limits), stop_strings=ends or None)
        inputs = inputs.to(self.device)
        if "pixel_values" in inputs:
            inputs["pixel_values"] = inputs["pixel_values"].to(self.model.dtype)
        tokenizer, length = self.processor.tokenizer, inputs["input_ids"].shape[1]
        stops = {"tokenizer": tokenizer} if ends else {}
        hint = f"{len(inputs['input_ids'])} conversations at once need too much memory: lower the batch size"
        with explain_memory_limit(hint), torch.inference_mode():
            rows = self.model.generate(**inputs, generation_config=settings, **stops).tolist()
        return [
            answer_text(tokenizer, row[:length], row[length : length + limit], ends)
            for row, limit in zip(rows, limits, strict=True)
        ]

    def stream(
        self,
        messages: Messages,
        images: Sequence[Any] = (),
        *,
        max_new_tokens: int | None = None,
        temperature: float = 0.0,
        top_p: float = 1.0,
    ) -> AnswerStream:
        """Answers the last message. The generation starts at once, in a thread of its own.

        Of a conversation that goes on, only what is new is computed; see `ConversationCache`.

        Args:
            messages: As `PIIPLlavaProcessor.apply_chat_template` takes them.
            images: Those of all messages, in order.
            max_new_tokens: Most tokens of the answer; None for 512, or fewer where the context has no room for them.
            temperature: See `generate`.
            top_p: See `generate`.

        Raises:
            UserError: As `encode`, and for a setting that cannot work.
        """
        settings = self.generation_config(
            max_new_tokens=DEFAULT_NEW_TOKENS if max_new_tokens is None else max_new_tokens,
            temperature=temperature,
            top_p=top_p,
        )
        inputs = self.encode(messages, images, max_new_tokens=max_new_tokens or 1)
        ids = inputs["input_ids"][0].tolist()
        settings.max_new_tokens = min(settings.max_new_tokens, self.context_length - len(ids))
        return AnswerStream(
            partial(
                self._generate_one, ids, inputs.get("pixel_values"), settings, image_sizes=inputs.get("image_sizes")
            ),
            tokenizer=self.processor.tokenizer,
            prompt_ids=ids,
            end_ids=self.end_ids,
            end_texts=self.end_texts,
            max_new_tokens=settings.max_new_tokens,
        )

    def _generate_one(self, *inputs: Any, **options: Any) -> None:
        hint = "begin a new one, give fewer images, or load the model in 4bit"
        with explain_memory_limit(f"too little memory for this conversation: {hint}"):
            self.cache.generate(*inputs, **options)


def check_sampling(max_new_tokens: int, temperature: float, top_p: float) -> None:
    """Raises a `ConfigError` for a setting that cannot work; see `ChatModel.generate`."""
    check(max_new_tokens > 0, "max_new_tokens", max_new_tokens, "1 or more")
    right = temperature == 0 or _LEAST_TEMPERATURE <= temperature < math.inf
    check(right, "temperature", temperature, f"0, or {_LEAST_TEMPERATURE:g} or more")
    check(0 < top_p <= 1, "top_p", top_p, "above 0, at most 1")


@contextmanager
def explain_memory_limit(message: str) -> Iterator[None]:
    """Raises a `MemoryLimitError` with this message if the device has too little memory for what is in the block."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise MemoryLimitError(message) from error


def _ends(model: nn.Module, processor: PIIPLlavaProcessor) -> tuple[list[int], list[str]]:
    """Ids and texts that end an answer: the model's end tokens, and what the template puts after an answer."""
    tokenizer, mark = processor.tokenizer, "answer"
    ids = model.generation_config.eos_token_id
    ids = [ids] if isinstance(ids, int) else list(ids or [])
    if tokenizer.eos_token_id is not None:
        ids.append(tokenizer.eos_token_id)
    text, spans = render_conversation(
        [{"role": "user", "content": "<image>"}, {"role": "assistant", "content": mark}],
        chat_template=processor.chat_template,
        tokenizer=tokenizer,
    )
    end = text[slice(*spans[-1])].rpartition(mark)[2] if spans else ""
    token = tokenizer.get_added_vocab().get(end.strip())
    if token is not None:
        return sorted({*ids, token}), []
    return sorted(set(ids)), [end] if end else []


def model_folder(folder: Path) -> Path:
    """The folder with the files, checked to be one of ours: a mistake would show as a missing key otherwise.

    The name of a released model is as good as a folder; see `fetch_released`.

    Raises:
        CheckpointError: If it is neither.
    """
    if not folder.exists() and folder.name == str(folder):
        try:
            return fetch_released(folder.name)
        except ConfigError as error:
            raise CheckpointError(f"{folder}: no such folder (looked from {Path.cwd()}), and {error}") from None
    folder = final_folder(folder)
    if is_trained_folder(folder):
        return folder
    if not (folder / "config.json").is_file():
        raise CheckpointError(f"{folder}: has no config.json; expected a folder that training or the converter wrote")
    kind = read_json(folder / "config.json", CheckpointError).get("model_type")
    if kind != PIIPLlavaConfig.model_type:
        raise CheckpointError(
            f"{folder}: holds a model of type {kind!r}, expected {PIIPLlavaConfig.model_type!r}; published checkpoints "
            "are converted first: python tools/convert_llava_checkpoint.py FOLDER OUTPUT"
        )
    return folder


def _device(device: str | torch.device | None) -> torch.device:
    if device is None:
        device = "cuda:0" if torch.cuda.is_available() else "cpu"
    try:
        found = torch.device(device)
    except RuntimeError as error:
        raise UserError(f"device={device!r}: expected a device of PyTorch such as 'cuda', 'cuda:1' or 'cpu'") from error
    if found.type == "cuda" and (found.index or 0) >= torch.cuda.device_count():
        raise UserError(f"device={str(device)!r}: there are {torch.cuda.device_count()} GPUs that PyTorch can use")
    return found
