"""The web page: its components, what they call, and how it is served."""

from __future__ import annotations

import ipaddress
import sys
from collections.abc import Callable, Iterator
from typing import Any

import gradio as gr
from starlette.datastructures import MutableHeaders
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from piip_core.errors import ConfigError, UserError

from ..inference import DEFAULT_NEW_TOKENS
from .web_session import MAX_CHARACTERS, MAX_IMAGES, View, WebChat, WebSession

__all__ = ["build_page", "serve_page"]

MAX_BYTES = 10_000_000  # of an uploaded file
_MAX_WAITING = 16  # questions that wait for their turn; more are refused
_SESSION_SECONDS, _UPLOAD_SECONDS = 2 * 3600, 6 * 3600  # how long conversations and uploads are kept
_SUFFIXES = (".jpg", ".jpeg", ".png", ".gif", ".webp")
_LOOPBACK = ["localhost", "127.0.0.1", "::1", "[::1]"]
# Events that run the model wait for each other
_MODEL = dict(concurrency_id="model", concurrency_limit=1, api_visibility="private")
_AT_ONCE = dict(queue=False, api_visibility="private", show_progress="hidden")

# Gradio offers to send images of a conversation to a public site; texts keep their lines and indents
_STYLE = """
#log button[aria-label=Share], #log button[title=Share] { display: none }
#log .message-content .md { white-space: pre-wrap }
"""

# Answers and file names are never markup; should one of them become markup all the same, the browser runs and loads
# nothing that this server does not have. Gradio's own page needs inline scripts.
_HEADERS = {
    "Content-Security-Policy": "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:; "
    "style-src 'self' 'unsafe-inline'; img-src 'self' data: blob:; media-src 'self' blob:; font-src 'self' data:; "
    "connect-src 'self'; worker-src 'self' blob:; object-src 'none'; base-uri 'self'; form-action 'self'; "
    "frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}


def build_page(chat: WebChat, *, title: str = "PIIP-LLaVA") -> gr.Blocks:
    """The page of a model."""
    with gr.Blocks(title=title, analytics_enabled=False, delete_cache=(600, _UPLOAD_SECONDS)) as page:
        session = gr.State(chat.session(), time_to_live=_SESSION_SECONDS, delete_callback=chat.stop)
        gr.Markdown(f"## {_escape(title)}", latex_delimiters=[])
        with gr.Row():
            with gr.Column(scale=3, min_width=360):
                # Its buttons would copy escaped text
                options = dict(height=460, render_markdown=False, latex_delimiters=[], buttons=[], elem_id="log")
                log = gr.Chatbot(label="Conversation", **options)
                notice = gr.Textbox(visible=False, show_label=False, container=False, elem_id="notice")
                box = gr.MultimodalTextbox(
                    placeholder=f"Ask; add up to {MAX_IMAGES} images",
                    file_types=list(_SUFFIXES),
                    file_count="multiple",
                    sources=["upload"],
                    max_plain_text_length=MAX_CHARACTERS,
                    show_label=False,
                    elem_id="question",
                )
                with gr.Row():
                    retry = gr.Button("Retry", size="sm", elem_id="retry")
                    clear = gr.Button("Clear", size="sm", elem_id="clear")
            with gr.Column(scale=2, min_width=320):
                settings = _add_settings(chat)
                show_latest, maps = _add_looking_panel(chat, session) if chat.is_local else (None, [])
        shown = [log, notice, box, retry, session]

        visitors: dict[str | None, WebSession] = {}  # by Gradio's number of the visit

        def ask(
            question: dict[str, Any], kept: WebSession, warmth: float, top_p: float, most: float, visit: gr.Request
        ) -> Iterator[list[Any]]:
            visitors[visit.session_hash] = kept
            for view in chat.ask(kept, question["text"], question["files"], _as_settings(warmth, top_p, most)):
                # A question leaves its box, and comes back if it was refused
                value = None if view.refused and view.running else question if view.refused else _EMPTY
                yield _update(view, kept, value)

        def again(kept: WebSession, warmth: float, top_p: float, most: float) -> Iterator[list[Any]]:
            for view in chat.retry(kept, _as_settings(warmth, top_p, most)):
                yield _update(view, kept, None)

        def left(visit: gr.Request) -> None:
            if visit.session_hash in visitors:
                chat.stop(visitors.pop(visit.session_hash))

        def forget(kept: WebSession) -> list[Any]:
            return [*_update(chat.clear(kept), kept, _EMPTY), *[None] * len(maps)]

        asked = box.submit(ask, [box, session, *settings], shown, show_progress="hidden", **_MODEL)
        if show_latest is not None:
            show_latest(asked)
        retry.click(again, [session, *settings], shown, show_progress="hidden", **_MODEL)
        page.unload(left)
        box.stop(chat.stop, [session], **_AT_ONCE)
        gr.on([clear.click, log.clear], forget, [session], [*shown, *maps], **_AT_ONCE)
    return page.queue(max_size=_MAX_WAITING, default_concurrency_limit=1)


def serve_page(page: gr.Blocks, *, host: str, port: int, block: bool = True) -> str:
    """Serves a page until Ctrl-C (or without waiting), to this machine alone if it listens at a loopback address.

    A page from elsewhere can let its own name point to 127.0.0.1 and read what a server there says (DNS rebinding);
    the browser still sends that name in the header Host.

    Returns:
        The local address.

    Raises:
        ConfigError: If nothing can listen there, or the page does not answer.
    """
    middleware = [Middleware(_SafeHeaders)]
    if _is_loopback(host):
        middleware.append(Middleware(TrustedHostMiddleware, allowed_hosts=_LOOPBACK, www_redirect=False))
    else:
        print(f"warning: everybody who reaches {host} can use the page; it has no password", file=sys.stderr)
    try:
        # `launch` and not `mount_gradio_app`, with which Gradio 6.31 opens any file that a request names
        _, address, _ = page.launch(
            server_name=host,
            server_port=port,
            share=False,
            inbrowser=False,
            show_error=False,
            max_file_size=MAX_BYTES,
            footer_links=[],
            ssr_mode=False,
            mcp_server=False,
            run_history=False,
            theme=gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]),
            css=_STYLE,
            enable_monitoring=False,
            prevent_thread_lock=True,
            app_kwargs={"middleware": middleware, "docs_url": None, "redoc_url": None, "openapi_url": None},
        )
    # a ValueError if the page does not answer itself within 3 seconds
    except (OSError, OverflowError, ValueError) as error:
        page.close(verbose=False)
        message = f"--host {host} --port {port}: cannot serve there ({error}); give another, or retry"
        raise ConfigError(message) from error
    if block:
        page.block_thread()
    return address


class _SafeHeaders:
    """Adds `_HEADERS` to every answer."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(_HEADERS)
            await send(message)

        await self._app(scope, receive, with_headers if scope["type"] == "http" else send)


def _is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _add_settings(chat: WebChat) -> list[gr.Slider]:
    """Sampling settings, in the order of `_as_settings`."""
    most = chat.max_new_tokens
    with gr.Accordion("Sampling", open=False):
        return [
            gr.Slider(0, 2, 0.0, step=0.05, label="Temperature", info="0: always the most probable token"),
            gr.Slider(0.05, 1, 1.0, step=0.05, label="Top p", info="sample among the most probable tokens"),
            gr.Slider(1, most, min(DEFAULT_NEW_TOKENS, most), step=1, label="Longest answer", info="in tokens"),
        ]


def _as_settings(temperature: float, top_p: float, max_new_tokens: float) -> dict[str, Any]:
    return {"temperature": temperature, "top_p": top_p, "max_new_tokens": int(max_new_tokens)}


def _add_looking_panel(chat: WebChat, session: gr.State) -> tuple[Callable[[Any], Any], list[gr.Image]]:
    """The panel that shows what each branch looked at: what updates it after an event, and its images."""
    image = dict(format="png", interactive=False, buttons=[])
    with gr.Accordion("What each branch looked at", open=True):
        with gr.Row():
            number = gr.Number(1, label="Image", info="of the conversation", precision=0, minimum=1, maximum=MAX_IMAGES)
            depth = gr.Slider(0, 1, 0.5, step=0.05, label="Depth", info="0: first block, 1: last", min_width=160)
        whole = gr.Image(label="As the model sees it: click on it", height=260, elem_id="seen", **image)
        start = gr.Button("Look at the middle", size="sm", elem_id="look")
    with gr.Tabs():
        with gr.Tab("Attention of each branch"):
            attention = gr.Image(show_label=False, elem_id="attention", **image)
        with gr.Tab("What the branches read from each other"):
            sampling = gr.Image(show_label=False, elem_id="sampling", **image)
    maps = [attention, sampling]

    def seen(kept: WebSession, chosen: int) -> list[Any]:
        images = kept.conversation.images
        return [images[chosen - 1] if 1 <= chosen <= len(images) else None, None, None]

    def latest(kept: WebSession) -> list[Any]:
        chosen = max(1, len(kept.conversation.images))
        return [chosen, *seen(kept, chosen)]

    def look(kept: WebSession, chosen: int, share: float, at: tuple[int, int] | None = None) -> list[Any]:
        try:
            return list(chat.look(kept, chosen, at=at, depth=share))
        except UserError as error:
            gr.Warning(_escape(str(error)))
            return [None, None]

    def clicked(kept: WebSession, chosen: int, share: float, event: gr.SelectData) -> list[Any]:
        return look(kept, chosen, share, tuple(event.index))

    number.input(seen, [session, number], [whole, *maps], **_AT_ONCE)
    start.click(look, [session, number, depth], maps, **_MODEL)
    whole.select(clicked, [session, number, depth], maps, **_MODEL)
    return lambda event: event.then(latest, [session], [number, whole, *maps], **_AT_ONCE), [whole, *maps]


_EMPTY = {"text": "", "files": []}


def _update(view: View, kept: WebSession, value: dict[str, Any] | None) -> list[Any]:
    """Log, notice, box, retry button and session of the page."""
    changed = {} if value is None else {"value": value}
    return [
        view.messages,
        gr.Textbox(view.notice, visible=bool(view.notice)),
        gr.MultimodalTextbox(submit_btn=not view.running, stop_btn=view.running, **changed),
        gr.Button(interactive=not view.running),
        kept,
    ]


def _escape(text: str) -> str:
    """Text where Gradio expects Markdown or HTML."""
    escaped = text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return "".join(f"\\{char}" if char in "\\`*_[]!$" else char for char in escaped)
