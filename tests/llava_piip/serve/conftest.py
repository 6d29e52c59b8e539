"""A model with prepared answers, images in files, and a served page."""

import threading

import pytest


class Stream:
    """Gives prepared pieces until it is closed; an exception among them is raised, an event is waited for."""

    def __init__(self, pieces, finish_reason):
        self.pieces, self.ends_with, self.finish_reason = iter(pieces), finish_reason, None
        self.closed = threading.Event()

    def __iter__(self):
        return self

    def __next__(self):
        for piece in self.pieces:
            if isinstance(piece, BaseException):
                raise piece
            while isinstance(piece, threading.Event) and not self.closed.is_set():
                if piece.wait(0.005):
                    piece = ""
            if self.closed.is_set():
                break
            return piece
        self.finish_reason = self.finish_reason or self.ends_with
        raise StopIteration

    def close(self):
        self.closed.set()
        self.finish_reason = self.finish_reason or "cancelled"

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()


class Answers:
    """A small model whose answers are prepared; remembers what it was asked, with a mark for each image."""

    def __init__(self, chat, answers, finish_reason):
        self.answers, self.finish_reason = list(answers), finish_reason
        self.asked, self.images, self.settings, self.streams = [], [], [], []
        self.processor, self.model, self.context_length = chat.processor, chat.model, chat.context_length

    def stream(self, messages, images, **settings):
        self.asked.append([said(message) for message in messages])
        self.images.append(list(images))
        self.settings.append(settings)
        self.streams.append(Stream(self.answers.pop(0), self.finish_reason))
        return self.streams[-1]


def said(message):
    """The text of a message, with a mark for each image in front."""
    content = message["content"]
    if isinstance(content, str):
        return content
    return "".join("[image] " if part["type"] == "image" else part["text"] for part in content)


@pytest.fixture
def prepared(tiny_chat):
    """Makes a model with prepared answers."""
    return lambda *answers, finish_reason="stop": Answers(tiny_chat, answers, finish_reason)


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

    def serve(chat):
        pages.append(serve_page(build_page(chat, title="a <b>model</b>"), host="127.0.0.1", port=int(free_port())))
        return pages[-1].local_url

    yield serve
    for page in pages:
        page.close(verbose=False)
