"""A model behind an OpenAI-compatible server, such as `vllm serve` or `transformers serve`."""

from __future__ import annotations

import base64
import io
import os
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from PIL import Image

from piip_core.errors import ConfigError, UserError

from ..conversation import Messages

try:
    import openai
except ModuleNotFoundError:
    openai = None

_ADDRESS = "expected a running OpenAI-compatible server, such as http://127.0.0.1:8000/v1"
_FIXES = {  # by HTTP status
    None: _ADDRESS,
    401: "set OPENAI_API_KEY to a key that it accepts",
    404: f"{_ADDRESS}, and with --model a name that it knows",
}


class RemoteModel:
    """Answers as `ChatModel` does, by asking the model of this name, by default the first one that the server names.

    The environment's OPENAI_API_KEY goes with requests. Raises a `ConfigError` if the package `openai` is not
    installed, and a `UserError` if the server names no model.
    """

    def __init__(self, url: str, name: str | None = None) -> None:
        if openai is None:
            raise ConfigError("--server needs openai: pip install --no-build-isolation -e '.[client]'")
        self.url = url
        with _explain_failure(url):
            self.client = openai.OpenAI(base_url=url, api_key=os.environ.get("OPENAI_API_KEY") or "none")
            self.name = name or next((model.id for model in self.client.models.list()), None)
        if self.name is None:
            raise UserError(f"--server {url}: names no model; give the name with --model")

    def stream(self, messages: Messages, images: Sequence[Image.Image], **settings: Any) -> RemoteStream:
        """Answers the last message; see `ChatModel.stream`. Without `max_new_tokens` the server limits the answer."""
        request = {"model": self.name, "stream": True, "temperature": 0.0, "top_p": 1.0, **settings}
        if "max_new_tokens" in request:
            request["max_tokens"] = request.pop("max_new_tokens")
        left = iter(images)
        request["messages"] = [message | {"content": _with_images(message["content"], left)} for message in messages]
        return RemoteStream(self, request)


class RemoteStream(AbstractContextManager):
    """The pieces of one answer, whose iteration raises `UserError`; see `llava_piip.streaming.AnswerStream`."""

    def __init__(self, model: RemoteModel, request: dict[str, Any]) -> None:
        self.finish_reason: str | None = None
        self._pieces = self._read(model, request)

    def __iter__(self) -> Iterator[str]:
        return self._pieces

    def close(self) -> None:
        """Ends the answer; where another thread waits for the next piece, once that has come."""
        self.finish_reason = self.finish_reason or "cancelled"

    def __exit__(self, *error: object) -> None:
        self.close()
        self._pieces.close()

    def _read(self, model: RemoteModel, request: dict[str, Any]) -> Iterator[str]:
        begun = False
        with _explain_failure(model.url), model.client.chat.completions.create(**request) as chunks:
            for chunk in chunks:
                if self.finish_reason is not None:
                    return
                for choice in chunk.choices[:1]:
                    text = (choice.delta and choice.delta.content) or ""
                    if text := text if begun else text.lstrip():
                        begun = True
                        yield text
                    if choice.finish_reason is not None:
                        self.finish_reason = choice.finish_reason
                        return
        raise UserError(f"--server {model.url}: ended the answer before it was complete; {_ADDRESS}")


@contextmanager
def _explain_failure(url: str) -> Iterator[None]:
    """Raises a `UserError` of one line for whatever goes wrong: a server may answer anything."""
    try:
        yield
    except Exception as error:
        reason = "".join(char if char.isprintable() else " " for char in f"{error} {error.__cause__ or ''}")
        fix = _FIXES.get(getattr(error, "status_code", None), "its log may say more")
        raise UserError(f"--server {url}: {' '.join(reason.split())[:500]}; {fix}") from error


def _with_images(content: Any, images: Iterator[Image.Image]) -> Any:
    """The content of a message in OpenAI's form, with the next images where their parts stand."""
    if isinstance(content, str):
        return content
    return [_image_part(next(images)) if part["type"] == "image" else part for part in content]


def _image_part(image: Image.Image) -> dict[str, Any]:
    file = io.BytesIO()
    image.save(file, "PNG", compress_level=1)
    url = "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
    return {"type": "image_url", "image_url": {"url": url}}
