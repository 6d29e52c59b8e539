"""A model with prepared answers, images in files, and a served page."""

import threading
import time

import pytest

from llava_piip.serve.dialogue import parts_of
from llava_piip.serve.web_session import WebChat


class Stream:
    """Gives prepared pieces until the stop event; an exception among them is raised, an event is waited for."""

    def __init__(self, pieces, stop_event):
        self.pieces, self.stop_event, self.finish_reason = pieces, stop_event, None

    def __iter__(self):
        for piece in self.pieces:
            if isinstance(piece, BaseException):
                raise piece
            while isinstance(piece, threading.Event) and not (piece.is_set() or self.stop_event.is_set()):
                time.sleep(0.005)
            if self.stop_event.is_set():
                self.finish_reason = "cancelled"
                return
            if isinstance(piece, str):
                yield piece
        self.finish_reason = "stop"

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.finish_reason = self.finish_reason or "cancelled"


class Answers:
    """A small model whose answers are prepared; remembers what it was asked."""

    def __init__(self, chat, *answers):
        self.answers, self.asked, self.streams = list(answers), [], []
        self.processor, self.model, self.context_length = chat.processor, chat.model, chat.context_length

    def stream(self, messages, images, *, stop_event, **settings):
        self.asked.append([parts_of(message)[1] for message in messages])
        self.streams.append(Stream(self.answers.pop(0), stop_event))
        return self.streams[-1]


@pytest.fixture
def prepared(tiny_chat):
    """Makes a page's logic with prepared answers, and a visitor."""

    def make(*answers, **limits):
        web = WebChat(Answers(tiny_chat, *answers), **limits)
        return web, web.session()

    return make


@pytest.fixture
def files(pictures, tmp_path):
    """Three pictures in files."""
    for name, picture in zip("abc", pictures, strict=False):
        picture.save(tmp_path / f"{name}.png")
    return [tmp_path / f"{name}.png" for name in "abc"]


@pytest.fixture
def served(tmp_path, monkeypatch, free_port):
    """Serves a page; gives its address."""
    pytest.importorskip("gradio", reason="the web page needs gradio")
    from llava_piip.serve.web_page import build_page, serve_page

    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path / "uploads"))
    monkeypatch.setenv("GRADIO_HEARTBEAT_INTERVAL", "0.5")
    pages = []

    def serve(web):
        pages.append(build_page(web, title="a <b>model</b>"))
        return serve_page(pages[-1], host="127.0.0.1", port=int(free_port()), block=False)

    yield serve
    for page in pages:
        page.close(verbose=False)
