"""The web page: its components, what they call, what the branches look at, and how it is served."""

from __future__ import annotations

import html
import io
import ipaddress
import logging
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from functools import partial
from typing import Any

import gradio as gr
import numpy as np
import torch
from matplotlib.figure import Figure
from PIL import Image
from starlette.datastructures import MutableHeaders
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from piip_core.errors import ConfigError, UserError
from piip_core.visualization import draw_attention, draw_sampling, find_pyramid, prepare_scene, trace_pyramid

from ..inference import DEFAULT_NEW_TOKENS, ChatModel
from .dialogue import Conversation, open_image
from .remote import RemoteModel

MAX_BYTES = 10_000_000  # of an uploaded file
MAX_CHARACTERS = 20_000  # of a question
MAX_IMAGES = 8  # of a conversation
_log = logging.getLogger(__name__)

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


def build_page(chat: ChatModel | RemoteModel, *, title: str = "PIIP-LLaVA", system: str | None = None) -> gr.Blocks:
    """The page of a model; `system` is a message in front of all conversations, instead of the template's own."""
    with gr.Blocks(title=title, analytics_enabled=False, delete_cache=(600, _UPLOAD_SECONDS)) as page:
        session = gr.State(Conversation(system), time_to_live=_SESSION_SECONDS, delete_callback=_stop)
        gr.Markdown(f"## {_escape(title)}", latex_delimiters=[])
        with gr.Row():
            with gr.Column(scale=3, min_width=360):
                # Its buttons would copy escaped text
                options = dict(height=460, render_markdown=False, latex_delimiters=[], buttons=[], elem_id="log")
                log = gr.Chatbot(label="Conversation", **options)
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
                is_local = not isinstance(chat, RemoteModel)
                show_latest, maps = _add_looking_panel(chat, session) if is_local else (None, [])
        shown = [log, box, retry, session]

        def forget(kept: Conversation) -> list[Any]:
            kept.reset()
            return [*_update(kept, _EMPTY), *[None] * len(maps)]

        asked = box.submit(partial(ask, chat), [session, box, *settings], shown, show_progress="hidden", **_MODEL)
        if show_latest is not None:
            show_latest(asked)
        retry.click(partial(ask_again, chat), [session, *settings], shown, show_progress="hidden", **_MODEL)
        box.stop(_stop, [session], **_AT_ONCE)
        # After the answer that it stops, and not into it
        stopped = gr.on([clear.click, log.clear], _stop, [session], **_AT_ONCE)
        stopped.then(forget, [session], [*shown, *maps], show_progress="hidden", **_MODEL)
    return page.queue(max_size=_MAX_WAITING, default_concurrency_limit=1)


def ask(
    chat: ChatModel | RemoteModel, kept: Conversation, question: dict[str, Any], *settings: float
) -> Iterator[list[Any]]:
    """Streams the answer to a question with uploaded images; what is refused comes back into its box."""
    value = question
    try:
        _add_question(chat, kept, question["text"], question["files"])
        yield _update(kept, _EMPTY, "")
        yield from _answer(chat, kept, settings)
        value = None
    except Exception as error:
        _warn(error)
        kept.pending = []
    yield _update(kept, value)


def ask_again(chat: ChatModel | RemoteModel, kept: Conversation, *settings: float) -> Iterator[list[Any]]:
    """Answers the last question once more, in place of its answer, which stays if that fails."""
    before = list(kept.messages), list(kept.images)
    try:
        kept.ask(kept.retract())
        yield _update(kept, None, "")
        yield from _answer(chat, kept, settings)
    except Exception as error:
        _warn(error)
        (kept.messages, kept.images), kept.pending = before, []
    yield _update(kept)


def _add_question(chat: ChatModel | RemoteModel, kept: Conversation, text: str, files: list[str]) -> None:
    """Adds a question with uploaded images, kept as a model here sees them: decoded files can be far larger."""
    if len(text) > MAX_CHARACTERS:
        raise UserError(f"the question has {len(text)} characters: at most {MAX_CHARACTERS} are taken")
    if (count := len(kept.images) + len(files)) > MAX_IMAGES:
        raise UserError(f"the conversation would have {count} images: at most {MAX_IMAGES}; clear it")
    images = map(open_image, files)
    if not isinstance(chat, RemoteModel):
        images = (network_view(chat, image) for image in images)
    kept.pending = [*zip(files, images, strict=True)]
    kept.ask(text)


def _answer(chat: ChatModel | RemoteModel, kept: Conversation, settings: Sequence[float]) -> Iterator[list[Any]]:
    """Streams the answer to the question at the end; says if it was cut."""
    temperature, top_p, most = settings
    text = ""
    with closing(kept.answer(chat, temperature=temperature, top_p=top_p, max_new_tokens=int(most))) as pieces:
        for piece in pieces:
            text += piece
            yield _update(kept, None, text)
    reason = kept.stream.finish_reason
    if not text.strip():
        raise UserError("stopped before the answer began" if reason == "cancelled" else "the model said nothing")
    if reason == "length":
        gr.Info("the answer was cut: raise the longest answer")


def _stop(kept: Conversation) -> None:
    """Ends the answer that is on its way; what came of it stays."""
    if kept.stream is not None:
        kept.stream.close()


def serve_page(page: gr.Blocks, *, host: str, port: int) -> gr.Blocks:
    """Serves a page in threads of its own, to this machine alone if it listens at a loopback address.

    A page from elsewhere can let its own name point to 127.0.0.1 and read what a server there says (DNS rebinding);
    the browser still sends that name in the header Host.

    Returns:
        The page, whose `block_thread` waits for Ctrl-C.

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
        page.launch(
            server_name=host,
            server_port=port,
            share=False,
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
    return page


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


def _add_settings(chat: ChatModel | RemoteModel) -> list[gr.Slider]:
    """Temperature, top p, and the most tokens of an answer, which leave room in the context."""
    most = 2 * DEFAULT_NEW_TOKENS
    if not isinstance(chat, RemoteModel):
        most = min(most, chat.context_length // 2)
    with gr.Accordion("Sampling", open=False):
        return [
            gr.Slider(0, 2, 0.0, step=0.05, label="Temperature", info="0: always the most probable token"),
            gr.Slider(0.05, 1, 1.0, step=0.05, label="Top p", info="sample among the most probable tokens"),
            gr.Slider(1, most, min(DEFAULT_NEW_TOKENS, most), step=1, label="Longest answer", info="in tokens"),
        ]


def _add_looking_panel(chat: ChatModel, session: gr.State) -> tuple[Callable[[Any], Any], list[gr.Image]]:
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

    def seen(kept: Conversation, chosen: int) -> list[Any]:
        return [kept.images[chosen - 1] if chosen <= len(kept.images) else None, None, None]

    def latest(kept: Conversation) -> list[Any]:
        chosen = max(1, len(kept.images))
        return [chosen, *seen(kept, chosen)]

    def draw(kept: Conversation, chosen: int, share: float, at: tuple[int, int] | None = None) -> list[Any]:
        if chosen > len(kept.images):
            gr.Warning(f"image {chosen}: the conversation has {len(kept.images)}; ask about an image first")
            return [None, None]
        return list(look(chat, kept.images[chosen - 1], at=at, depth=share))

    def clicked(kept: Conversation, chosen: int, share: float, event: gr.SelectData) -> list[Any]:
        return draw(kept, chosen, share, tuple(event.index))

    number.input(seen, [session, number], [whole, *maps], **_AT_ONCE)
    start.click(draw, [session, number, depth], maps, **_MODEL)
    whole.select(clicked, [session, number, depth], maps, **_MODEL)
    return lambda event: event.then(latest, [session], [number, whole, *maps], **_AT_ONCE), [whole, *maps]


def look(
    chat: ChatModel, image: Image.Image, *, at: tuple[int, int] | None = None, depth: float = 0.5
) -> tuple[Image.Image, Image.Image | None]:
    """Draws the self-attention of one point of an image in a block of every branch (paper section IV-G).

    Not to be called while the same model answers: the blocks are watched meanwhile.

    Args:
        chat: The model.
        image: RGB.
        at: The point, (x, y) in pixels of `network_view`; None for the middle.
        depth: Which block of each branch, and which interaction: 0 the first, 1 the last.

    Returns:
        The drawing, and one of what the point reads from the other branches, None for a single branch.
    """
    view, pixels = _prepare(chat, image)
    pyramid = find_pyramid(chat.model)
    scene = prepare_scene(view.shape[:2], view, pixels.to(next(pyramid.parameters()).dtype), at)
    blocks = [round(depth * (branch.num_blocks - 1)) for branch in pyramid.branches]
    count = len(pyramid.interactions)
    interaction = round(depth * (count - 1)) if count else None
    trace = trace_pyramid(pyramid, scene, blocks=blocks, interaction=interaction)
    attention = draw_attention(scene, trace, "What the marked place attends to, mean over the heads")
    if not trace.readings:
        return _as_image(attention), None
    title = f"What it reads from other branches, interaction {interaction + 1} of {count}"
    return _as_image(attention), _as_image(draw_sampling(scene, trace, title))


def network_view(chat: ChatModel, image: Image.Image) -> Image.Image:
    """An image as the vision tower gets it: a square of its size, which is the same to the model."""
    return Image.fromarray(_prepare(chat, image)[0])


def _prepare(chat: ChatModel, image: Image.Image) -> tuple[np.ndarray, torch.Tensor]:
    """What the tower gets, as an image (S, S, 3) uint8 and as values (1, 3, S, S)."""
    processor = chat.processor.image_processor
    pixels = processor(images=[image], return_tensors="pt")["pixel_values"]
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (processor.image_mean, processor.image_std))
    shown = ((pixels[0] * std + mean) * 255).round().clamp(0, 255).to(torch.uint8)
    return shown.permute(1, 2, 0).numpy(), pixels


def _as_image(figure: Figure) -> Image.Image:
    file = io.BytesIO()
    figure.savefig(file, format="png")
    return Image.open(file).convert("RGB")


_EMPTY = {"text": "", "files": []}


def _update(kept: Conversation, value: dict[str, Any] | None = None, text: str | None = None) -> list[Any]:
    """Log, box, retry button and session of the page; with the text of an answer that is on its way."""
    running = text is not None
    changed = {} if value is None else {"value": value}
    return [
        _shown(kept.messages + ([{"role": "assistant", "content": text}] if text else [])),
        gr.MultimodalTextbox(submit_btn=not running, stop_btn=running, **changed),
        gr.Button(interactive=not running),
        kept,
    ]


def _shown(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Messages as Gradio's chatbot takes them: images by their files, everything else as escaped text.

    The chatbot inserts texts as HTML even where it renders no Markdown, and images can make a model say anything.
    """
    shown = []
    for message in messages:
        if message["role"] != "system":
            content = message["content"]
            parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
            texts = [
                {"path": part["url"], "alt_text": "an image"}
                if part["type"] == "image"
                else {"type": "text", "text": html.escape(part["text"], quote=False)}
                for part in parts
            ]
            shown.append({"role": message["role"], "content": texts})
    return shown


def _warn(error: Exception) -> None:
    """Says what failed; nothing about the inside of the program."""
    if isinstance(error, UserError):
        gr.Warning(_escape(str(error)))
    else:
        _log.error("an answer failed", exc_info=error)
        gr.Warning("internal error")


def _escape(text: str) -> str:
    """Text where Gradio expects Markdown or HTML."""
    return "".join(f"\\{char}" if char in "\\`*_[]!$" else char for char in html.escape(text, quote=False))
