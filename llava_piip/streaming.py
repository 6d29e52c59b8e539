"""One answer in pieces, while a thread generates it, and where an answer ends."""

from __future__ import annotations

import queue
import re
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase, StoppingCriteria, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

__all__ = ["AnswerStream", "AnswerText", "TokenText", "answer_text"]

FinishReason = Literal["stop", "length", "cancelled"]

_INCOMPLETE = "\ufffd"  # what bytes that are no whole character decode to
_BYTE_TOKEN = re.compile(r"<0x[0-9A-F]{2}>")  # SentencePiece's tokens for single bytes


class AnswerStream(BaseStreamer, Iterator[str]):
    """The pieces of one answer, as they are generated; `ChatModel.stream` makes it.

    What goes wrong in the generation is raised by the iteration. `close` (or the end of a `with` block) ends the answer
    early. Joined, the pieces are the answer without white space at its start; no piece ends within a character.

    transformers' `TextStreamer` decodes each line for itself, which loses the spaces in front of it, and knows no end
    texts.

    Args:
        generate: Generates one answer, given `streamer` and `stopping_criteria` as transformers' `generate` takes them.
        tokenizer: Of the model.
        prompt_ids: The prompt.
        end_ids: Tokens that end an answer.
        end_texts: Texts that do, and are no part of it.
        max_new_tokens: Most tokens of the answer.
        stop_event: Ends the answer after the next token, once it is set.

    Attributes:
        prompt_tokens: Tokens of the conversation, visual ones included.
        finish_reason: None while it runs; then "stop" (the model ended the answer), "length" (`max_new_tokens` reached)
            or "cancelled".
    """

    def __init__(
        self,
        generate: Callable[..., Any],
        *,
        tokenizer: PreTrainedTokenizerBase,
        prompt_ids: Sequence[int],
        end_ids: Sequence[int],
        end_texts: Sequence[str],
        max_new_tokens: int,
        stop_event: threading.Event | None = None,
    ) -> None:
        self.prompt_tokens = len(prompt_ids)
        self.finish_reason: FinishReason | None = None
        self._text, self._answer = TokenText(tokenizer, prompt_ids[-1:]), AnswerText(end_texts)
        self._pieces: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        self._tokens: list[int] | None = None  # before the prompt has come
        self._end_ids, self._max_new_tokens = end_ids, max_new_tokens
        self._closed = threading.Event()
        self._error: BaseException | None = None
        stops = StoppingCriteriaList([_Ended(self._answer, self._closed, stop_event or self._closed)])
        self._thread = threading.Thread(target=self._run, args=(generate, stops), daemon=True)
        self._thread.start()

    @property
    def answer_tokens(self) -> int:
        """Tokens generated so far, the end token among them."""
        return len(self._tokens or ())

    def put(self, value: Tensor) -> None:
        """Takes the prompt and then the tokens of the answer, from `generate`."""
        if self._tokens is None:
            self._tokens = []
            return
        tokens = value.flatten().tolist()
        self._tokens += tokens
        self._pieces.put(self._answer.add(self._text.add(tokens)))

    def end(self) -> None:
        """Takes the end of the generation, from `generate`."""
        self._pieces.put(self._answer.add(self._text.add([], finished=True)) + self._answer.rest())

    def __next__(self) -> str:
        while self.finish_reason is None:
            piece = self._pieces.get()
            if piece:
                return piece
            if piece is None:
                self._finish()
        raise StopIteration

    def close(self) -> None:
        """Ends the answer, and waits until the generation has stopped."""
        self._closed.set()
        self._thread.join()
        self.finish_reason = self.finish_reason or "cancelled"

    def __enter__(self) -> AnswerStream:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _finish(self) -> None:
        self._thread.join()
        if self._error is not None:
            self.finish_reason = "cancelled"
            raise self._error
        if self._answer.ended or (self._tokens and self._tokens[-1] in self._end_ids):
            self.finish_reason = "stop"
        else:
            self.finish_reason = "length" if self.answer_tokens >= self._max_new_tokens else "cancelled"

    def _run(self, generate: Callable[..., Any], stops: StoppingCriteriaList) -> None:
        try:
            generate(streamer=self, stopping_criteria=stops)
        except BaseException as error:  # raised again in the thread that reads the answer
            self._error = error
        finally:
            self._pieces.put(None)


class AnswerText:
    """Finds the end of an answer in its pieces, and holds back what may be the start of one.

    The text that ends first counts, and of several that end at once the longest: however the answer is cut into
    pieces, the result is the same.

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
        """The text that is safe to show after another piece, without white space at the start of the answer."""
        if self.ended:
            return ""
        text = self._held + piece
        found = [(start + len(end), start) for end in self._ends if (start := text.find(end)) >= 0]
        self.ended = bool(found)
        starts = (n for end in self._ends for n in range(len(end)) if text.endswith(end[:n]))
        shown = min(found)[1] if found else len(text) - max(starts, default=0)
        self._held = "" if found else text[shown:]
        return self._without_blank(text[:shown])

    def rest(self) -> str:
        """What was held back, when nothing more comes."""
        text, self._held = self._held, ""
        return self._without_blank(text)

    def _without_blank(self, text: str) -> str:
        if self._blank:
            text = text.lstrip()
            self._blank = not text
        return text


class TokenText:
    """New text of tokens that come one after the other; joined it is what decoding all of them at once gives.

    Args:
        tokenizer: Of the model.
        before: Tokens in front: after them the first token keeps the space it begins with.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, before: Sequence[int] = ()) -> None:
        self._tokenizer = tokenizer
        self._special = {token for token, added in tokenizer.added_tokens_decoder.items() if added.special}
        self._tokens = self._drop_special(before)
        self._start, self._read = 0, len(self._tokens)  # where the tokens shown last start and end

    def add(self, tokens: Sequence[int], *, finished: bool = False) -> str:
        """What these tokens add to the text; while a character may not be whole nothing, unless finished."""
        self._tokens += self._drop_special(tokens)
        if self._read == len(self._tokens) or (not finished and self._is_byte(self._tokens[-1])):
            return ""
        # Decoded with the tokens shown last in front: by itself a token loses its space
        shown, text = (self._decode(self._tokens[self._start : end]) for end in (self._read, None))
        if not finished and (len(text) <= len(shown) or text.endswith(_INCOMPLETE)):
            return ""
        self._start, self._read = self._read, len(self._tokens)
        return text[len(shown) :]

    def _drop_special(self, tokens: Sequence[int]) -> list[int]:
        return [token for token in tokens if token not in self._special]

    def _is_byte(self, token: int) -> bool:
        """Whether it stands for one byte: one more that fits no character spoils the whole row of them."""
        return _BYTE_TOKEN.fullmatch(self._tokenizer.convert_ids_to_tokens(token) or "") is not None

    def _decode(self, tokens: Sequence[int]) -> str:
        return self._tokenizer.decode(tokens, clean_up_tokenization_spaces=False)


def answer_text(
    tokenizer: PreTrainedTokenizerBase, prompt_ids: Sequence[int], answer_ids: Sequence[int], ends: Sequence[str] = ()
) -> str:
    """A whole answer, up to the first of the texts that end it, without white space around it."""
    answer = AnswerText(ends)
    text = TokenText(tokenizer, prompt_ids[-1:]).add(answer_ids, finished=True)
    return (answer.add(text) + answer.rest()).strip()


class _Ended(StoppingCriteria):
    """Ends the generation once its text has ended or an event is set."""

    def __init__(self, answer: AnswerText, *events: threading.Event) -> None:
        self._answer, self._events = answer, events

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: Any) -> Tensor:
        ended = self._answer.ended or any(event.is_set() for event in self._events)
        return torch.full((len(input_ids),), ended, dtype=torch.bool, device=input_ids.device)
