"""The routes: what may come in, how much of it, and what goes out."""

from __future__ import annotations

import asyncio
import hmac
import json
import logging
import time
import uuid
from collections.abc import AsyncIterator, Coroutine
from contextlib import AbstractContextManager, aclosing, asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import anyio
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from piip_core.errors import ConfigError, UserError

from .engine import Answer, Engine, EngineError
from .fetching import FetchError, FetchPolicy, ImageFetcher
from .generation import ContextLengthError, SamplingError
from .hosts import HostCheck
from .metrics import Metrics
from .pictures import PictureReader
from .protocol import ApiError, ChatRequest, Usage, chunk, completion, parse_request

__all__ = ["ServerSettings", "create_app"]

_GONE = 499  # nobody reads it
_LAST_EVENT = 1.0  # seconds to tell a client of the time-out

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class ServerSettings:
    """Who may ask, and how much.

    Attributes:
        name: What clients call the model.
        api_key: What clients must send; None asks for nothing.
        max_waiting: Requests that wait beside the `Engine.max_batch` that run; more get 429.
        timeout: Seconds for a request, from its first byte to the end of its answer.
        max_body: Bytes of a request.
        fetch: Which pictures are fetched.
        allowed_hosts: Hosts that requests may be for beside this machine, see `HostCheck`; None allows any.

    Raises:
        ConfigError: For a number that cannot work.
    """

    name: str
    api_key: str | None = field(default=None, repr=False)
    max_waiting: int = 64
    timeout: float = 120.0
    max_body: int = 32_000_000
    fetch: FetchPolicy = field(default_factory=FetchPolicy)
    allowed_hosts: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        if self.max_waiting < 0:
            raise ConfigError(f"max_waiting={self.max_waiting}: expected 0 or more")
        for name in ("timeout", "max_body"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"{name}={getattr(self, name)}: expected more than 0")


def create_app(engine: Engine, settings: ServerSettings, *, metrics: Metrics | None = None) -> FastAPI:
    """The application; starts the engine when it starts, and stops it when it ends.

    Args:
        engine: Answers.
        settings: Who may ask, and how much.
        metrics: What is counted; by default this application alone.

    Raises:
        ConfigError: If the engine has not the places that the pictures of one request need.
    """
    if engine.settings.image_places < settings.fetch.max_images:
        raise ConfigError(
            f"image_places={engine.settings.image_places}: a request may have {settings.fetch.max_images} pictures, "
            "expected places for as many"
        )
    pictures = PictureReader(engine.chat, ImageFetcher(settings.fetch))
    service = _Service(engine, settings, pictures, metrics or Metrics())

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        await engine.start()
        try:
            yield
        finally:
            await engine.stop()
            service.pictures.close()

    app = FastAPI(title="PIIP-LLaVA", lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None)
    if settings.allowed_hosts is not None:
        app.add_middleware(HostCheck, names=settings.allowed_hosts, refuse=_refused_host)
    app.add_exception_handler(ApiError, _api_error)
    app.add_exception_handler(HTTPException, _http_error)
    app.add_exception_handler(Exception, _internal_error)
    app.add_api_route("/v1/chat/completions", service.complete, methods=["POST"])
    app.add_api_route("/v1/models", service.models, methods=["GET"])
    app.add_api_route("/v1/models/{name:path}", service.model, methods=["GET"])
    app.add_api_route("/health", service.health, methods=["GET"])
    app.add_api_route("/metrics", service.metrics_text, methods=["GET"])
    return app


class _Service:
    """What the routes share."""

    def __init__(self, engine: Engine, settings: ServerSettings, pictures: PictureReader, metrics: Metrics) -> None:
        self.engine, self.settings, self.pictures, self.metrics = engine, settings, pictures, metrics
        self.started = int(time.time())
        self.active = 0
        self.usual_seconds = 1.0

    async def health(self) -> Response:
        """200 while the engine runs, for load balancers; needs no key."""
        alive = self.engine.alive
        return JSONResponse({"status": "ok" if alive else "stopped"}, status_code=200 if alive else 503)

    async def metrics_text(self, request: Request) -> Response:
        """Prometheus' format."""
        self._check_key(request)
        return Response(await self.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    async def models(self, request: Request) -> Response:
        """The one model."""
        self._check_key(request)
        return JSONResponse({"object": "list", "data": [self._model()]})

    async def model(self, request: Request, name: str) -> Response:
        """The one model, by its name."""
        self._check_key(request)
        self._check_model(name)
        return JSONResponse(self._model())

    async def complete(self, request: Request) -> Response:
        """A chat completion."""
        ticket = _Ticket(self)
        try:
            self._check_key(request)
            self._admit(ticket)
            with _until(ticket.deadline):
                body = await self._body(request)
                return await _unless_gone(request, self._answer(body, ticket))
        except ClientDisconnect:
            ticket.close("cancelled")
            return Response(status_code=_GONE)
        except BaseException as error:
            failure = _failure(error)
            ticket.close("cancelled" if failure is None else failure.status)
            if failure is None:
                raise
            raise failure from None

    async def _answer(self, body: bytes, ticket: _Ticket) -> Response:
        asked = parse_request(body)
        self._check_model(asked.model)
        conversation, images = asked.conversation, await self.pictures.read(asked.images)
        answer = await self.engine.prepare(conversation, images, asked.sampling)
        self.metrics.images.inc(len(images))
        self.metrics.prompt_tokens.inc(answer.prompt_tokens)
        if asked.stream:
            return _EventStream(self._events(asked, answer, ticket), ticket)
        text = ""
        async with aclosing(answer.pieces()) as pieces:
            async for piece in pieces:
                ticket.saw_text()
                text += piece
        ticket.tokens = len(answer.tokens)
        ticket.close(200)
        return JSONResponse(completion(ticket.identity, asked.model, text, str(answer.finish_reason), _usage(answer)))

    async def _events(self, asked: ChatRequest, answer: Answer, ticket: _Ticket) -> AsyncIterator[str]:
        """Server-sent events; what goes wrong becomes one of them, for the status is sent by now."""

        def event(**options: Any) -> str:
            return _event(chunk(ticket.identity, asked.model, **options))

        outcome: str | int = "cancelled"
        try:
            yield event(delta={"role": "assistant", "content": ""})
            async with aclosing(answer.pieces()) as pieces:
                while piece := await _next(pieces, ticket.deadline):
                    ticket.saw_text()
                    yield event(delta={"content": piece})
            yield event(reason=answer.finish_reason)
            if asked.stream_options is not None and asked.stream_options.include_usage:
                yield event(usage=_usage(answer))
            yield "data: [DONE]\n\n"
            outcome = 200
        except (Exception, asyncio.CancelledError) as error:
            failure = _failure(error)
            if failure is None:
                raise
            outcome = failure.status
            yield _event(failure.body)
        finally:
            ticket.tokens = len(answer.tokens)
            ticket.close(outcome)

    async def _body(self, request: Request) -> bytes:
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "application/json":  # also keeps pages of other sites out, which may not send that type
            raise ApiError(415, "the header Content-Type must be application/json", param="Content-Type")
        most = self.settings.max_body
        body = bytearray()
        async for data in request.stream():
            body += data
            if len(body) > most:
                raise ApiError(413, f"the request has more than {most} bytes: send fewer or smaller pictures")
        return bytes(body)

    def _admit(self, ticket: _Ticket) -> None:
        if not self.engine.alive:
            raise ApiError(503, "the model is not running")
        batch = self.engine.max_batch
        if self.active >= batch + self.settings.max_waiting:
            wait = max(1, round(self.usual_seconds * self.active / batch))
            raise ApiError(
                429,
                f"{self.active} requests run and wait, no more are taken: ask again in {wait} seconds",
                code="overloaded",
                headers={"Retry-After": str(wait)},
            )
        ticket.admit()

    def _check_key(self, request: Request) -> None:
        key = self.settings.api_key
        if key is None:
            return
        scheme, _, given = request.headers.get("authorization", "").partition(" ")
        right = hmac.compare_digest(given.strip().encode(), key.encode())
        if scheme.lower() != "bearer" or not right:
            raise ApiError(
                401,
                "expected the header Authorization: Bearer KEY with the server's key",
                param="Authorization",
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )

    def _check_model(self, name: str) -> None:
        if name != self.settings.name:
            raise ApiError(404, f"model: there is {self.settings.name!r} only", param="model", code="model_not_found")

    def _model(self) -> dict[str, Any]:
        return {"id": self.settings.name, "object": "model", "created": self.started, "owned_by": "piip"}


class _Ticket:
    """A request's place among those that are admitted; counts what became of it, once."""

    def __init__(self, service: _Service) -> None:
        self.identity = f"chatcmpl-{uuid.uuid4().hex}"
        self.tokens = 0
        self._service, self._start = service, time.monotonic()
        self._admitted = self._closed = self._has_text = False
        self.deadline = asyncio.get_running_loop().time() + service.settings.timeout

    def admit(self) -> None:
        self._admitted = True
        self._service.active += 1
        self._service.metrics.active.inc()

    def saw_text(self) -> None:
        if not self._has_text:
            self._has_text = True
            self._service.metrics.first_piece.observe(time.monotonic() - self._start)

    def close(self, outcome: str | int) -> None:
        if self._closed:
            return
        self._closed = True
        service, seconds = self._service, time.monotonic() - self._start
        service.metrics.requests.labels(str(outcome)).inc()
        service.metrics.answer_tokens.inc(self.tokens)
        if outcome == 200:
            service.metrics.duration.observe(seconds)
            service.usual_seconds += 0.1 * (seconds - service.usual_seconds)
        if self._admitted:
            service.active -= 1
            service.metrics.active.dec()


async def _next(pieces: AsyncIterator[str], deadline: float) -> str | None:
    """The next piece, None at the end. The time-out spans no `yield`, where it would hit whoever iterates."""
    with _until(deadline):
        return await anext(pieces, None)


def _until(deadline: float) -> AbstractContextManager[Any]:
    """Raises TimeoutError in the block when the loop's clock is there; asyncio has it from Python 3.11 on."""
    return anyio.fail_after(deadline - anyio.current_time())


class _EventStream(StreamingResponse):
    """Ends the generation however the connection ends, before the first event too, and if the client does not read."""

    def __init__(self, events: AsyncIterator[str], ticket: _Ticket) -> None:
        super().__init__(events, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        self._events, self._ticket = events, ticket

    async def __call__(self, *arguments: Any) -> None:
        try:
            with _until(self._ticket.deadline + _LAST_EVENT):
                await super().__call__(*arguments)
        except TimeoutError:
            pass  # an incomplete response: the connection is closed
        finally:
            await self._events.aclose()
            self._ticket.close("cancelled")


async def _unless_gone(request: Request, work: Coroutine[Any, Any, Response]) -> Response:
    """Result of the work on a request whose body was read; the work is cancelled when the client goes away.

    Raises:
        ClientDisconnect: If it did.
    """
    task = asyncio.ensure_future(work)
    watcher = asyncio.ensure_future(_gone(request))
    try:
        await asyncio.wait((task, watcher), return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientDisconnect
        return task.result()
    finally:
        watcher.cancel()
        task.cancel()
        await asyncio.gather(task, watcher, return_exceptions=True)


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _failure(error: BaseException) -> ApiError | None:
    """What a client hears of an error; None if it is gone. Nothing of what happened inside."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, FetchError):
        return ApiError(400, str(error), param=error.field, code="invalid_image")
    if isinstance(error, ContextLengthError):
        return ApiError(400, f"messages: {error}", param="messages", code="context_length_exceeded")
    if isinstance(error, SamplingError):
        return ApiError(400, str(error), param=error.field)
    if isinstance(error, UserError):
        return ApiError(400, f"messages: {error}", param="messages")
    if isinstance(error, TimeoutError):
        return ApiError(504, "the answer was not complete in time", code="timeout")
    if not isinstance(error, Exception):
        return None
    _log.error("internal error", exc_info=error)
    return ApiError(503 if isinstance(error, EngineError) else 500, "internal error")


def _event(body: dict[str, Any]) -> str:
    return f"data: {json.dumps(body, ensure_ascii=False)}\n\n"


def _usage(answer: Answer) -> Usage:
    return Usage(answer.prompt_tokens, len(answer.tokens))


def _refused_host(status: int, message: str) -> Response:
    return JSONResponse(ApiError(status, message, param="Host").body, status_code=status)


async def _api_error(_: Request, error: Any) -> Response:
    return JSONResponse(error.body, status_code=error.status, headers=error.headers)


async def _http_error(request: Request, error: Any) -> Response:
    return await _api_error(request, ApiError(error.status_code, str(error.detail), headers=error.headers))


async def _internal_error(request: Request, _: Any) -> Response:
    return await _api_error(request, ApiError(500, "internal error"))
