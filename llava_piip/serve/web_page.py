"""The web page: components, what they call, and how it is served."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

import gradio as gr
from gradio import processing_utils
from starlette.datastructures import MutableHeaders
from starlette.middleware import Middleware
from starlette.responses import PlainTextResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from piip_core.errors import ConfigError, UserError

from .fetching import FetchError, FetchPolicy, decode_image
from .hosts import HostCheck, is_loopback
from .web_session import View, WebChat, WebLimits, WebSession

__all__ = ["build_page", "find_examples", "serve_page"]

_SUFFIXES = (".jpg", ".jpeg", ".png", ".gif", ".webp")
_MOST_EXAMPLES = 8
_PHOTOGRAPHS = ("astronaut", "coffee", "chelsea", "rocket")
_QUESTION = "Describe the picture."
_MODEL = "model"  # events with this concurrency_id wait for each other

# Gradio offers to send pictures of a conversation to a public site; texts keep their lines and indents
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


def find_examples(folder: Path | None, policy: FetchPolicy) -> list[Path]:
    """Example pictures: those of a folder, or photographs that come with scikit-image.

    Args:
        folder: None for scikit-image's, without which there are none.
        policy: What a visitor could upload; examples have to keep to it.

    Raises:
        ConfigError: If the folder does not exist, or has no picture or more than the page shows.
        FetchError: If a picture is broken or too large.
    """
    if folder is None:
        try:
            from skimage import data
        except ModuleNotFoundError:
            return []
        found = [Path(data.__file__).parent / f"{name}{suffix}" for name in _PHOTOGRAPHS for suffix in _SUFFIXES]
        return [path for path in found if path.is_file()]
    if not folder.is_dir():
        raise ConfigError(f"--examples {folder}: no such folder")
    pictures = sorted(path for path in folder.iterdir() if path.suffix.lower() in _SUFFIXES)
    if not 1 <= len(pictures) <= _MOST_EXAMPLES:
        raise ConfigError(f"--examples {folder}: has {len(pictures)} pictures, expected 1 to {_MOST_EXAMPLES}")
    for path in pictures:
        try:
            decode_image(path.read_bytes(), field=str(path), policy=policy)
        except OSError as error:
            raise FetchError(str(path), f"cannot be read ({error.strerror})") from error
    return pictures


def build_page(chat: WebChat, *, examples: list[Path] | None = None, title: str = "PIIP-LLaVA") -> gr.Blocks:
    """The page of a model.

    Args:
        chat: Answers.
        examples: Pictures to try.
        title: Of the page.
    """
    limits = chat.limits
    with gr.Blocks(title=title, analytics_enabled=False, delete_cache=(600, limits.upload_seconds)) as page:
        session = gr.State(chat.session(), time_to_live=limits.session_seconds, delete_callback=chat.stop)
        gr.Markdown(f"## {_plain(title)}", latex_delimiters=[])
        with gr.Row():
            with gr.Column(scale=3, min_width=360):
                log = gr.Chatbot(
                    label="Conversation",
                    height=460,
                    render_markdown=False,
                    latex_delimiters=[],
                    buttons=[],  # they would copy escaped text
                    elem_id="log",
                )
                notice = gr.Textbox(visible=False, show_label=False, container=False, elem_id="notice")
                box = gr.MultimodalTextbox(
                    placeholder=f"Ask; add up to {limits.pictures.max_images} pictures",
                    file_types=list(_SUFFIXES),
                    file_count="multiple",
                    sources=["upload"],
                    max_plain_text_length=limits.max_characters,
                    show_label=False,
                    elem_id="question",
                )
                with gr.Row():
                    retry = gr.Button("Retry", size="sm", elem_id="retry")
                    clear = gr.Button("Clear", size="sm", elem_id="clear")
                if examples:
                    gr.Examples(
                        [[{"text": _QUESTION, "files": [str(path)]}] for path in examples],
                        inputs=[box],
                        label="Examples",
                        cache_examples=False,
                    )
            with gr.Column(scale=2, min_width=320):
                settings = _settings(chat)
                choice = _choice(limits)
        panel = _panel(chat, session, *choice)
        shown = [log, notice, box, retry, clear, choice[0], session]
        asking = dict(outputs=shown, concurrency_id=_MODEL, concurrency_limit=1, api_visibility="private")
        at_once = dict(queue=False, api_visibility="private", show_progress="hidden")

        visitors: dict[str, WebSession] = {}  # whose answer is on its way, by Gradio's number of the visit

        def ask(
            question: dict[str, Any], kept: WebSession, warmth: float, top_p: float, most: float, visit: gr.Request
        ) -> Iterator[list[Any]]:
            visitors[visit.session_hash] = kept
            views = chat.ask(kept, question["text"], question["files"], _read(warmth, top_p, most))
            yield from _updates(views, kept, question)
            visitors.pop(visit.session_hash, None)

        def again(kept: WebSession, warmth: float, top_p: float, most: float, visit: gr.Request) -> Iterator[list[Any]]:
            visitors[visit.session_hash] = kept
            yield from _updates(chat.retry(kept, _read(warmth, top_p, most)), kept, None)
            visitors.pop(visit.session_hash, None)

        def left(visit: gr.Request) -> None:
            if visit.session_hash in visitors:
                chat.stop(visitors.pop(visit.session_hash))

        def forget(kept: WebSession) -> list[Any]:
            return [*_update(chat.clear(kept), kept, {"text": "", "files": []}), *[None] * len(panel)]

        box.submit(ask, [box, session, *settings], show_progress="hidden", **asking)
        retry.click(again, [session, *settings], show_progress="hidden", **asking)
        box.stop(chat.stop, [session], **at_once)
        clear.click(forget, [session], [*shown, *panel], **at_once)
        page.unload(left)
        log.clear(forget, [session], [*shown, *panel], **at_once)
    return page.queue(max_size=limits.max_waiting, default_concurrency_limit=1)


def serve_page(
    page: gr.Blocks, limits: WebLimits, *, host: str, port: int, share: bool = False, block: bool = True
) -> str:
    """Serves a page until Ctrl-C.

    Args:
        page: As `build_page` makes it.
        limits: Those of its visitors.
        host: Address to listen at.
        port: Port, or 0 for a free one.
        share: Ask Gradio's service for a public address.
        block: False returns at once.

    Returns:
        The local address.

    Raises:
        ConfigError: If nothing can listen there.
    """
    middleware = [Middleware(_SafeHeaders)]
    if is_loopback(host) and not share:
        middleware.append(Middleware(HostCheck, names=(), refuse=_refused_host))
    # Whoever sends a question by hand could name an address in place of an uploaded file
    processing_utils.async_ssrf_protected_get = _fetch_nothing
    try:
        _, address, _ = page.launch(
            server_name=host,
            server_port=port or None,
            share=share,
            inbrowser=False,
            show_error=False,
            max_file_size=limits.pictures.max_bytes,
            state_session_capacity=limits.sessions,
            footer_links=[],
            ssr_mode=False,
            mcp_server=False,
            run_history=False,
            theme=gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]),
            css=_STYLE,
            enable_monitoring=False,
            prevent_thread_lock=True,
            _frontend=False,  # no check of its own whether the page answers within 3 seconds: busy machines need longer
            app_kwargs={"middleware": middleware, "docs_url": None, "redoc_url": None, "openapi_url": None},
        )
    except OSError as error:
        raise ConfigError(f"--host {host} --port {port}: cannot listen there ({error}); give another") from error
    if block:
        page.block_thread()
    return address


def _refused_host(status: int, _: str) -> Response:
    return PlainTextResponse("this page is for this machine only", status)


def _settings(chat: WebChat) -> list[gr.Slider]:
    """Sampling settings, in the order of `_read`."""
    most = chat.most_new_tokens
    with gr.Accordion("Sampling", open=False):
        return [
            gr.Slider(0, 2, 0.0, step=0.05, label="Temperature", info="0: always the most probable token"),
            gr.Slider(0.05, 1, 1.0, step=0.05, label="Top p", info="sample among the most probable tokens"),
            gr.Slider(1, most, chat.default_new_tokens, step=1, label="Longest answer", info="in tokens"),
        ]


def _read(temperature: float, top_p: float, max_new_tokens: float) -> dict[str, Any]:
    return {"temperature": temperature, "top_p": top_p, "max_new_tokens": int(max_new_tokens)}


def _choice(limits: WebLimits) -> tuple[gr.Dropdown, gr.Slider, gr.Image, gr.Button]:
    """Where to look: picture, depth, place, and a button for the middle."""
    with gr.Accordion("What each branch looked at", open=True):
        with gr.Row():
            number = gr.Dropdown(
                [(f"picture {n}", n) for n in range(1, limits.pictures.max_images + 1)],
                value=None,
                label="Picture",
                info="of the conversation",
                interactive=True,
                elem_id="picture-number",
                min_width=120,
            )
            depth = gr.Slider(0, 1, 0.5, step=0.05, label="Depth", info="0: first block, 1: last", min_width=160)
        whole = gr.Image(
            label="As the model sees it: click on a place",
            format="png",
            interactive=False,
            buttons=[],
            height=260,
            elem_id="seen",
        )
        start = gr.Button("Look at the middle", size="sm", elem_id="look")
    return number, depth, whole, start


def _panel(
    chat: WebChat, session: gr.State, number: gr.Dropdown, depth: gr.Slider, whole: gr.Image, start: gr.Button
) -> list[gr.Image]:
    """What each branch looked at; the pictures that go with the conversation when it is cleared."""
    with gr.Tabs():
        with gr.Tab("Attention of each branch"):
            attention = gr.Image(show_label=False, format="png", interactive=False, buttons=[], elem_id="attention")
        with gr.Tab("What the branches read from each other"):
            sampling = gr.Image(show_label=False, format="png", interactive=False, buttons=[], elem_id="sampling")
    maps = [attention, sampling]

    def seen(kept: WebSession, chosen: int | None) -> list[Any]:
        pictures = kept.conversation.pictures
        return [pictures[chosen - 1].image if chosen and chosen <= len(pictures) else None, None, None]

    def look(kept: WebSession, chosen: int | None, share: float, place: tuple[int, int] | None) -> list[Any]:
        try:
            found = chat.look(kept, chosen or 1, at=place, depth=share)
        except UserError as error:
            gr.Warning(_plain(str(error)))
            return [None, None]
        return [found.attention, found.sampling]

    def middle(kept: WebSession, chosen: int | None, share: float) -> list[Any]:
        return look(kept, chosen, share, None)

    def clicked(kept: WebSession, chosen: int | None, share: float, event: gr.SelectData) -> list[Any]:
        return look(kept, chosen, share, tuple(event.index))

    inputs, turn = [session, number, depth], dict(concurrency_id=_MODEL, concurrency_limit=1, api_visibility="private")
    number.change(seen, [session, number], [whole, *maps], queue=False, api_visibility="private")
    start.click(middle, inputs, maps, **turn)
    whole.select(clicked, inputs, maps, **turn)
    return [whole, *maps]


def _updates(views: Iterator[View], kept: WebSession, question: dict[str, Any] | None) -> Iterator[list[Any]]:
    """Updates of the page; a question leaves its box, and comes back if it was refused."""
    for view in views:
        if question is None or (view.refused and view.running):
            value = None
        else:
            value = question if view.refused else {"text": "", "files": []}
        yield _update(view, kept, value)


def _update(view: View, kept: WebSession, value: dict[str, Any] | None) -> list[Any]:
    """In the order of the outputs of `build_page`."""
    changed = {} if value is None else {"value": value}
    count = len(kept.conversation.pictures)
    return [
        view.messages,
        gr.Textbox(view.notice, visible=bool(view.notice)),
        gr.MultimodalTextbox(submit_btn=not view.running, stop_btn=view.running, **changed),
        gr.Button(interactive=not view.running),
        gr.Button(interactive=True),
        gr.Dropdown(value=count or None),
        kept,
    ]


async def _fetch_nothing(url: str) -> NoReturn:
    raise gr.Error("addresses are not fetched: upload the picture", print_exception=False)


class _SafeHeaders:
    """Adds `_HEADERS` to every answer."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in _HEADERS.items():
                    headers[name] = value
            await send(message)

        await self._app(scope, receive, with_headers if scope["type"] == "http" else send)


def _plain(text: str) -> str:
    """Text where Gradio expects Markdown or HTML."""
    escaped = text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return "".join(f"\\{char}" if char in "\\`*_[]!$" else char for char in escaped)
