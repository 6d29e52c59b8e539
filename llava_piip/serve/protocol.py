"""What clients send and get: the part of OpenAI's chat completions that this model can do, and its errors."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, ValidationError, model_validator

from ..conversation import IMAGE_TAG
from .engine import Sampling

__all__ = ["ApiError", "ChatRequest", "chunk", "completion", "parse_request"]


class ApiError(Exception):
    """An answer that is no 200.

    Args:
        status: Of HTTP.
        message: For the client; says what to change.
        param: The field that is wrong.
        code: A name that programs can test.
        headers: More of the answer's.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.headers = headers

    @property
    def body(self) -> dict[str, Any]:
        """In OpenAI's form."""
        kinds = {401: "authentication_error", 429: "rate_limit_error"}
        kind = kinds.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class TextPart(_Strict):
    """A text."""

    type: Literal["text"]
    text: str


class ImageUrl(_Strict):
    """Where a picture is; `detail` is accepted and has no effect, the model takes pictures in one size."""

    url: str
    detail: Literal["auto", "low", "high"] | None = None


class ImagePart(_Strict):
    """A picture."""

    type: Literal["image_url"]
    image_url: ImageUrl


def _form(content: Any) -> str:
    return "parts" if isinstance(content, (list, tuple)) else "text"


_Part = Annotated[TextPart | ImagePart, Field(discriminator="type")]
_Text = Annotated[
    Annotated[str, Tag("text")] | Annotated[list[TextPart], Tag("parts")],
    Discriminator(_form),
]
_TextAndImages = Annotated[
    Annotated[str, Tag("text")] | Annotated[list[_Part], Tag("parts")],
    Discriminator(_form),
]


class SystemMessage(_Strict):
    """What the model is told about its task; replaces the template's own."""

    role: Literal["system", "developer"]
    content: _Text
    name: str | None = None


class UserMessage(_Strict):
    """A question; pictures stand in front of its text, as in training."""

    role: Literal["user"]
    content: _TextAndImages
    name: str | None = None


class AssistantMessage(_Strict):
    """An earlier answer."""

    role: Literal["assistant"]
    content: _Text
    name: str | None = None
    refusal: None = None


class StreamOptions(_Strict):
    """Whether a last chunk has the counts of tokens."""

    include_usage: bool = False


class ResponseFormat(_Strict):
    """Text is all there is."""

    type: Literal["text"]


_Message = Annotated[SystemMessage | UserMessage | AssistantMessage, Field(discriminator="role")]
_StopText = Annotated[str, Field(min_length=1)]
_Stop = Annotated[
    Annotated[_StopText, Tag("text")] | Annotated[list[_StopText], Field(max_length=4), Tag("parts")],
    Discriminator(_form),
]
_Zero = Annotated[float, Field(ge=0, le=0)]


class ChatRequest(_Strict):
    """A request. Fields of OpenAI's that would change the answer and that this model cannot do are refused.

    `user`, `metadata` and `store` are accepted and have no effect.
    """

    model: str
    messages: Annotated[list[_Message], Field(min_length=1)]
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2, allow_inf_nan=False)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    stop: _Stop | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: Literal[1] | None = None
    presence_penalty: _Zero | None = None
    frequency_penalty: _Zero | None = None
    logprobs: Literal[False] | None = None
    response_format: ResponseFormat | None = None
    user: str | None = None
    metadata: dict[str, Any] | None = None
    store: bool | None = None

    @model_validator(mode="before")
    @classmethod
    def _no_two_limits(cls, values: Any) -> Any:
        if isinstance(values, dict) and None not in (values.get("max_tokens"), values.get("max_completion_tokens")):
            raise ValueError("give one of max_tokens and max_completion_tokens, they mean the same")
        return values

    @property
    def sampling(self) -> Sampling:
        """How the answer is made; most probable tokens unless a temperature is given."""
        stop = [self.stop] if isinstance(self.stop, str) else self.stop or []
        return Sampling(
            max_new_tokens=self.max_completion_tokens if self.max_tokens is None else self.max_tokens,
            temperature=0.0 if self.temperature is None else self.temperature,
            top_p=1.0 if self.top_p is None else self.top_p,
            stop=tuple(stop),
        )

    @property
    def images(self) -> list[tuple[str, str]]:
        """Field and address of every picture, in order."""
        return [
            (f"messages.{m}.content.{p}.image_url.url", part.image_url.url)
            for m, message in enumerate(self.messages)
            if not isinstance(message.content, str)
            for p, part in enumerate(message.content)
            if isinstance(part, ImagePart)
        ]

    @property
    def conversation(self) -> list[dict[str, Any]]:
        """Messages as `PIIPLlavaProcessor.apply_chat_template` takes them.

        Raises:
            ApiError: If there are pictures, and a text contains the tag that stands for one.
        """
        has_images = bool(self.images)
        found = []
        for number, message in enumerate(self.messages):
            parts = [message.content] if isinstance(message.content, str) else message.content
            if has_images and any(IMAGE_TAG in _text_of(part) for part in parts):
                raise ApiError(
                    400,
                    f"messages.{number}.content: a text contains {IMAGE_TAG}, which stands for a picture where there "
                    "are some: remove it, pictures are parts of type image_url",
                    param=f"messages.{number}.content",
                )
            if not isinstance(message.content, str):
                parts = [
                    {"type": "image"} if isinstance(part, ImagePart) else {"type": "text", "text": part.text}
                    for part in parts
                ]
            content = message.content if isinstance(message.content, str) else parts
            found.append({"role": "system" if message.role == "developer" else message.role, "content": content})
        return found


@dataclass(frozen=True)
class Usage:
    """Counts of tokens."""

    prompt_tokens: int
    completion_tokens: int

    @property
    def body(self) -> dict[str, int]:
        """In OpenAI's form."""
        total = self.prompt_tokens + self.completion_tokens
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": total,
        }


def parse_request(body: bytes) -> ChatRequest:
    """A request out of JSON.

    Raises:
        ApiError: 400, naming the first field that is wrong.
    """
    try:
        return ChatRequest.model_validate_json(body)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        field = ".".join(_path(first["loc"], body, first["type"])) or None
        message = first["msg"].removeprefix("Value error, ")
        if first["type"] == "extra_forbidden":
            message = "this field is unknown or not supported, remove it"
        raise ApiError(400, f"{field}: {message}" if field else message, param=field) from None


def _path(location: Sequence[str | int], body: bytes, kind: str) -> list[str]:
    """Path to a value in the request. pydantic's has also the names of the forms that a value may have."""
    if kind == "json_invalid":
        return []
    value, found = json.loads(body), []
    for number, item in enumerate(location):
        inside = isinstance(item, int) if isinstance(value, list) else isinstance(value, dict) and item in value
        if inside:
            value = value[item]
        if inside or (kind == "missing" and number == len(location) - 1):
            found.append(str(item))
    return found


def completion(identity: str, model: str, text: str, reason: str, usage: Usage) -> dict[str, Any]:
    """A whole answer."""
    choice = {
        "index": 0,
        "message": {"role": "assistant", "content": text, "refusal": None},
        "finish_reason": reason,
        "logprobs": None,
    }
    return _envelope(identity, "chat.completion", model, [choice]) | {"usage": usage.body}


def chunk(
    identity: str,
    model: str,
    *,
    delta: dict[str, str] | None = None,
    reason: str | None = None,
    usage: Usage | None = None,
) -> dict[str, Any]:
    """A piece of a streamed answer; with `usage` the one of counts, that has no choice."""
    choices: Sequence[dict[str, Any]] = []
    if usage is None:
        choices = [{"index": 0, "delta": delta or {}, "finish_reason": reason, "logprobs": None}]
    body = _envelope(identity, "chat.completion.chunk", model, choices)
    return body if usage is None else body | {"usage": usage.body}


def _envelope(identity: str, kind: str, model: str, choices: Sequence[dict[str, Any]]) -> dict[str, Any]:
    return {"id": identity, "object": kind, "created": int(time.time()), "model": model, "choices": choices}


def _text_of(part: Any) -> str:
    return part if isinstance(part, str) else getattr(part, "text", "")
