"""One answer in pieces, while a thread generates it."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    PreTrainedTokenizerBase,
    StoppingCriteria,
    StoppingCriteriaList,
    TextIteratorStreamer,
)

__all__ = ["AnswerStream", "AnswerText", "TokenText"]

FinishReason = Literal["stop", "length", "cancelled"]

_INCOMPLETE = "\ufffd"  # what bytes that are no whole character decode to


class AnswerStream(Iterator[str]):
    """The pieces of one answer, as they are generated; `ChatModel.stream` makes it.

    What goes wrong in the generation is raised by the iteration. `close` (or the end of a `with` block) ends the answer
    early. Joined, the pieces are the answer without blanks in front; no piece ends within a character.

    Attributes:
        prompt_tokens: Tokens of the conversation, visual ones included.
        finish_reason: None while it runs; then "stop" (the model ended the answer), "length" (`max_new_tokens` reached)
            or "cancelled".
    """

    def __init__(
        self,
        model: Any,
        tokenizer: PreTrainedTokenizerBase,
        inputs: Mapping[str, Any],
        settings: GenerationConfig,
        *,
        ends: Sequence[str],
        stop_event: threading.Event,
    ) -> None:
        self.prompt_tokens: int = inputs["input_ids"].shape[1]
        self.finish_reason: FinishReason | None = None
        self._settings = settings
        self._text = AnswerText(ends)
        self._streamer = _Streamer(tokenizer)
        self._cancel, self._done = stop_event, threading.Event()
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._generate, args=(model, inputs), daemon=True)
        self._thread.start()

    @property
    def answer_tokens(self) -> int:
        """Tokens generated so far, the end token among them."""
        return len(self._streamer.tokens)

    def __next__(self) -> str:
        while self.finish_reason is None:
            piece = next(self._streamer, None)
            text = self._text.rest() if piece is None else self._text.add(piece)
            if piece is None or self._text.ended:
                self._finish()
            if text:
                return text
        raise StopIteration

    def close(self) -> None:
        """Ends the answer, and waits until the generation has stopped."""
        self._done.set()
        self._thread.join()
        self.finish_reason = self.finish_reason or "cancelled"

    def __enter__(self) -> AnswerStream:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _finish(self) -> None:
        self._done.set()
        self._thread.join()
        tokens = self._streamer.tokens
        if self._error is not None:
            self.finish_reason = "cancelled"
            raise self._error
        if self._text.ended or (tokens and tokens[-1] in self._settings.eos_token_id):
            self.finish_reason = "stop"
        else:
            self.finish_reason = "length" if len(tokens) >= self._settings.max_new_tokens else "cancelled"

    def _generate(self, model: Any, inputs: Mapping[str, Any]) -> None:
        stops = StoppingCriteriaList([_StopEvents(self._cancel, self._done)])
        try:
            with torch.inference_mode():
                model.generate(
                    **inputs, generation_config=self._settings, streamer=self._streamer, stopping_criteria=stops
                )
        except BaseException as error:  # raised again in the thread that reads the answer
            self._error = error
            self._streamer.end()


class AnswerText:
    """Finds the end of an answer in its pieces, and holds back what may be the start of one.

    Args:
        ends: Texts that end the answer and are no part of it.

    Attributes:
        ended: Whether one of them has come.
    """

    def __init__(self, ends: Sequence[str]) -> None:
        self.ended = False
        self._ends = [end for end in ends if end]
        self._held, self._blank = "", True

    def add(self, piece: str) -> str:
        """The text that is safe to show after another piece; nothing after the end."""
        if self.ended:
            return ""
        text = self._held + piece
        if self._blank:
            text = text.lstrip()
        self._blank = self._blank and not text
        found = [position for end in self._ends if (position := text.find(end)) >= 0]
        if found:
            self.ended, self._held = True, ""
            return text[: min(found)]
        held = max((n for end in self._ends for n in range(len(end)) if text.endswith(end[:n])), default=0)
        self._held = text[len(text) - held :]
        return text[: len(text) - held]

    def rest(self) -> str:
        """What was held back, when nothing more comes."""
        text, self._held = self._held, ""
        return text


class TokenText:
    """New text of a growing list of tokens; joined it is what decoding all of them at once gives.

    Args:
        tokenizer: The model's.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._start = self._read = 0  # tokens shown last, and before

    def add(self, tokens: Sequence[int], *, finished: bool = False) -> str:
        """What is new in the text of all tokens so far; while a character is not whole, nothing, unless finished."""
        # Behind the tokens shown last: by itself a token loses the blank before it
        shown, text = (self._decode(tokens[self._start : end]) for end in (self._read, None))
        if len(text) <= len(shown) or (text.endswith(_INCOMPLETE) and not finished):
            return ""
        self._start, self._read = self._read, len(tokens)
        return text[len(shown) :]

    def _decode(self, tokens: Sequence[int]) -> str:
        return self._tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)


class _Streamer(TextIteratorStreamer):
    """Pieces by token instead of by word.

    The library's own decodes each line for itself, which loses the blanks in front of it.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        super().__init__(tokenizer, skip_prompt=True)
        self.tokens: list[int] = []
        self._new_text = TokenText(tokenizer)

    def put(self, value: Tensor) -> None:
        if self.next_tokens_are_prompt:
            self.next_tokens_are_prompt = False
            return
        for token in value.flatten().tolist():
            self.tokens.append(token)
            if text := self._new_text.add(self.tokens):
                self.on_finalized_text(text)

    def end(self) -> None:
        self.on_finalized_text(self._new_text.add(self.tokens, finished=True), stream_end=True)


class _StopEvents(StoppingCriteria):
    """Ends the generation once any of the events is set."""

    def __init__(self, *events: threading.Event) -> None:
        self._events = events

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: Any) -> Tensor:
        stop = any(event.is_set() for event in self._events)
        return torch.full((len(input_ids),), stop, dtype=torch.bool, device=input_ids.device)
