"""One answer in pieces while a thread generates it, and where an answer ends."""

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

_INCOMPLETE = "\ufffd"  # what bytes that are no whole character decode to
_BYTE_TOKEN = re.compile(r"<0x[0-9A-F]{2}>")  # SentencePiece's tokens for single bytes


class AnswerStream(BaseStreamer, StoppingCriteria, Iterator[str]):
    """The pieces of one answer, as they are generated; `ChatModel.stream` makes it.

    What goes wrong in the generation is raised by the iteration. `close` (or the end of a `with` block) ends the answer
    early. Joined, the pieces are the answer without white space at its start; no piece ends within a character.

    transformers' `TextStreamer` decodes each line for itself, which loses the spaces in front of it, and knows no end
    texts.

    Args:
        generate: Generates one answer, given `streamer` and `stopping_criteria` as transformers' `generate` takes them.
        end_texts: Texts that end an answer, and are no part of it.

    Attributes:
        prompt_tokens: Tokens of the conversation, visual ones included.
        answer_tokens: Tokens generated so far, the end token among them.
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
    ) -> None:
        self.prompt_tokens, self.answer_tokens = len(prompt_ids), 0
        self.finish_reason: Literal["stop", "length", "cancelled"] | None = None
        self._tokenizer, self._prompt_ids, self._end_ids = tokenizer, prompt_ids, end_ids
        self._end_texts, self._max_new_tokens = end_texts, max_new_tokens
        self._tokens: list[int] | None = None  # before the prompt has come
        self._text, self._shown, self._ended = "", "", False
        self._pieces: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        self._stop = threading.Event()
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, args=(generate,), daemon=True)
        self._thread.start()

    def put(self, value: Tensor) -> None:
        """Takes the prompt and then the tokens of the answer, from `generate`."""
        if self._tokens is None:
            self._tokens = []
            return
        self._tokens += value.flatten().tolist()
        self.answer_tokens = len(self._tokens)
        self._show()

    def end(self) -> None:
        """Takes the end of the generation, from `generate`."""
        self._show(finished=True)

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: Any) -> Tensor:
        """Whether the generation is to stop (B,): its text has ended, or nobody reads on."""
        return torch.full((len(input_ids),), self._stop.is_set(), dtype=torch.bool, device=input_ids.device)

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
        self._stop.set()
        self._thread.join()
        self.finish_reason = self.finish_reason or "cancelled"

    def __enter__(self) -> AnswerStream:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _show(self, *, finished: bool = False) -> None:
        """Hands on what is new in the text; while a character may not be whole nothing, unless finished."""
        text = _decode(self._tokenizer, self._prompt_ids, self._tokens or ())
        is_new, self._text = text != self._text, text
        if self._ended or not (finished or (is_new and self._is_whole(text))):
            return
        shown, self._ended = visible_text(text, self._end_texts, finished=finished)
        if self._ended:
            self._stop.set()
        self._pieces.put(shown[len(self._shown) :])
        self._shown = shown

    def _is_whole(self, text: str) -> bool:
        """Whether it ends with a character; after a byte, one more that fits none would spoil all before it."""
        last = self._tokenizer.convert_ids_to_tokens(self._tokens[-1]) or ""
        return not text.endswith(_INCOMPLETE) and _BYTE_TOKEN.fullmatch(last) is None

    def _finish(self) -> None:
        self._thread.join()
        if self._error is not None:
            self.finish_reason = "cancelled"
            raise self._error
        if self._ended or (self._tokens and self._tokens[-1] in self._end_ids):
            self.finish_reason = "stop"
        else:
            self.finish_reason = "length" if self.answer_tokens >= self._max_new_tokens else "cancelled"

    def _run(self, generate: Callable[..., Any]) -> None:
        try:
            generate(streamer=self, stopping_criteria=StoppingCriteriaList([self]))
        except BaseException as error:  # raised again in the thread that reads the answer
            self._error = error
        finally:
            self._pieces.put(None)


def answer_text(
    tokenizer: PreTrainedTokenizerBase, prompt_ids: Sequence[int], answer_ids: Sequence[int], ends: Sequence[str] = ()
) -> str:
    """A whole answer, up to the first of the texts that end it, without white space around it."""
    text, _ = visible_text(_decode(tokenizer, prompt_ids, answer_ids), ends, finished=True)
    return text.strip()


def visible_text(text: str, ends: Sequence[str], *, finished: bool) -> tuple[str, bool]:
    """What may be shown of an answer, without white space at its start, and whether it has ended.

    The text that ends first counts, and of several that end at once the longest. Unless the text is finished, what may
    be the start of one is held back.
    """
    found = [(start + len(end), start) for end in ends if (start := text.find(end)) >= 0]
    if found:
        return text[: min(found)[1]].lstrip(), True
    starts = (n for end in ends for n in range(len(end)) if text.endswith(end[:n]))
    held = 0 if finished else max(starts, default=0)
    return text[: len(text) - held].lstrip(), False


def _decode(tokenizer: PreTrainedTokenizerBase, prompt_ids: Sequence[int], answer_ids: Sequence[int]) -> str:
    """The text of an answer, decoded after the last token of the prompt: by itself its first token loses a space."""
    before = prompt_ids[-1:]
    options = dict(skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return tokenizer.decode([*before, *answer_ids], **options)[len(tokenizer.decode(before, **options)) :]
