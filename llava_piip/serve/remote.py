"""A model behind an OpenAI-compatible server, such as `vllm serve` or `transformers serve`."""

from __future__ import annotations

import base64
import io
import os
import threading
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from PIL import Image

from piip_core.errors import ConfigError, UserError

from ..streaming import AnswerText, FinishReason

try:
    import openai
except ModuleNotFoundError:
    openai = None

__all__ = ["RemoteModel"]


class RemoteModel:
    """Answers as `ChatModel.stream` does, by asking a server.

    Args:
        url: Of its API, such as http://127.0.0.1:8000/v1. The environment's OPENAI_API_KEY goes with requests.
        name: Of the model; None for the first one that the server names.

    Raises:
        ConfigError: If the package `openai` is not installed.
        UserError: If the server does not answer.
    """

    def __init__(self, url: str, *, name: str | None = None) -> None:
        if openai is None:
            raise ConfigError("--server needs the package openai: pip install --no-build-isolation -e '.[client]'")
        self._client = openai.OpenAI(base_url=url, api_key=os.environ.get("OPENAI_API_KEY", "none"), max_retries=0)
        try:
            self.name = name or next(iter(self._client.models.list())).id
        except (openai.OpenAIError, StopIteration, AttributeError, TypeError, ValueError) as error:  # whatever answers
            reason = _describe_error(error)
            raise UserError(f"--server {url}: names no model ({reason}); is it an OpenAI-compatible API?") from error

    def stream(
        self,
        messages: Sequence[Mapping[str, Any]],
        images: Sequence[Image.Image] = (),
        *,
        max_new_tokens: int | None = None,
        stop_event: threading.Event | None = None,
        **sampling: float,
    ) -> RemoteStream:
        """Answers the last message; see `ChatModel.stream`. Without `max_new_tokens` the server limits the answer.

        Raises:
            UserError: If the server refuses or does not answer.
        """
        options = {"temperature": 0.0, "top_p": 1.0, **sampling}
        if max_new_tokens is not None:
            options["max_tokens"] = max_new_tokens
        try:
            chunks = self._client.chat.completions.create(
                model=self.name, messages=_with_images(messages, images), stream=True, **options
            )
        except openai.OpenAIError as error:
            raise UserError(f"the server says: {_describe_error(error)}") from error
        return RemoteStream(chunks, stop_event or threading.Event())


class RemoteStream(Iterator[str]):
    """Pieces of one answer; see `llava_piip.streaming.AnswerStream`."""

    def __init__(self, chunks: Any, stop_event: threading.Event) -> None:
        self.finish_reason: FinishReason | None = None
        self.answer_tokens = 0  # as many as pieces came
        self._chunks, self._stop, self._text = chunks, stop_event, AnswerText(())

    def __next__(self) -> str:
        while self.finish_reason is None:
            if self._stop.is_set():
                self.close()
                break
            try:
                chunk = next(self._chunks, None)
            except (openai.OpenAIError, AttributeError, ValueError) as error:  # ValueError: no JSON
                self.finish_reason = "cancelled"
                raise UserError(f"the server says: {_describe_error(error)}") from error
            if chunk is None:
                self.close()
                raise UserError("the server ended its answer before it was complete")
            if chunk.choices:
                choice = chunk.choices[0]
                self.finish_reason = choice.finish_reason
                if text := self._text.add((choice.delta and choice.delta.content) or ""):
                    self.answer_tokens += 1
                    return text
        raise StopIteration

    def close(self) -> None:
        """Ends the answer."""
        self._chunks.close()
        self.finish_reason = self.finish_reason or "cancelled"

    def __enter__(self) -> RemoteStream:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def _describe_error(error: Exception) -> str:
    """What went wrong; openai says of every connection only that it failed."""
    cause = error.__cause__
    return f"{str(error).rstrip('.')}: {cause or type(cause).__name__}" if cause is not None else str(error)


def _with_images(messages: Sequence[Mapping[str, Any]], images: Sequence[Image.Image]) -> list[dict[str, Any]]:
    """Messages in OpenAI's form, with each image where its part stands."""
    left, found = iter(images), []
    for message in messages:
        content = message["content"]
        if not isinstance(content, str):
            content = [
                {"type": "image_url", "image_url": {"url": _data_uri(next(left))}} if part["type"] == "image" else part
                for part in content
            ]
        found.append({"role": message["role"], "content": content})
    return found


def _data_uri(image: Image.Image) -> str:
    file = io.BytesIO()
    image.save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
