"""A small model that answers, and pictures."""

import base64
import io
import threading
import time

import numpy as np
import pytest
import torch
from PIL import Image

from llava_piip.assembly import assemble
from llava_piip.serve.generation import ChatModel
from llava_piip.serve.web_session import WebChat, WebLimits


def _sharpen(model):
    """Makes the attention of a model with random weights sharp enough for pictures to matter."""
    with torch.no_grad():
        for projection in model.model.multi_modal_projector.projections.values():
            projection.linear_2.weight.mul_(10)
        for layer in model.model.language_model.layers:
            layer.self_attn.q_proj.weight.mul_(5)
            layer.self_attn.o_proj.weight.mul_(5)


@pytest.fixture
def tiny_chat(tiny_llava):
    """A small model with random weights, ready to answer; its attention is sharp enough for pictures to matter."""
    model, processor = tiny_llava
    _sharpen(model)
    return ChatModel(model, processor)


@pytest.fixture(scope="module")
def saved_chat(model_folder, randomize, tmp_path_factory):
    """One like `tiny_chat` for a whole file of tests, and the folder with it."""
    folder = tmp_path_factory.mktemp("saved") / "tiny"
    chat = ChatModel.load(model_folder, dtype="float32", device="cpu")
    torch.manual_seed(0)
    _sharpen(randomize(chat.model))
    chat.model.save_pretrained(folder)
    chat.processor.save_pretrained(folder)
    return chat, folder


@pytest.fixture(scope="session")
def pictures():
    """Pictures that a model with random weights tells apart: blocks of strong colours."""
    generator = np.random.default_rng(0)
    blocks = (generator.integers(0, 2, (12, 3, 4, 3)) * 255).astype(np.uint8)
    return [Image.fromarray(picture).resize((64, 48), Image.Resampling.NEAREST) for picture in blocks]


@pytest.fixture(scope="session")
def png():
    """Writes a picture as a PNG file's content."""

    def write(image: Image.Image) -> bytes:
        file = io.BytesIO()
        image.save(file, "PNG")
        return file.getvalue()

    return write


@pytest.fixture(scope="session")
def data_uri(png):
    """Writes a picture as a data URI."""
    return lambda image: "data:image/png;base64," + base64.b64encode(png(image)).decode()


@pytest.fixture(scope="session")
def model_folder(tiny_entry, language_model_folder, tmp_path_factory):
    """A model as the training saves it, in bfloat16."""
    folder = tmp_path_factory.mktemp("chat") / "model"
    torch.manual_seed(0)
    model, processor = assemble(
        tiny_entry(), language_model=language_model_folder, pretrained_vision=False, dtype=torch.bfloat16
    )
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


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
        pass


class Answers:
    """A small model whose answers are prepared; remembers what it was asked."""

    def __init__(self, chat, *answers):
        self.chat, self.answers, self.asked, self.streams = chat, list(answers), [], []
        self.processor, self.model, self.context_length = chat.processor, chat.model, chat.context_length

    def stream(self, messages, images, *, stop_event, **settings):
        self.asked.append([message["content"] for message in messages])
        self.streams.append(Stream(self.answers.pop(0), stop_event))
        return self.streams[-1]


@pytest.fixture
def prepared(tiny_chat):
    """Makes a page's logic with prepared answers, and a visitor."""

    def make(*answers, **limits):
        web = WebChat(Answers(tiny_chat, *answers), WebLimits(**limits))
        return web, web.session()

    return make


@pytest.fixture
def files(pictures, tmp_path):
    """Three pictures in files."""
    for name, picture in zip("abc", pictures, strict=False):
        picture.save(tmp_path / f"{name}.png")
    return [tmp_path / f"{name}.png" for name in "abc"]


@pytest.fixture
def served(files, tmp_path, monkeypatch):
    """Serves a page; gives its address. Everything in `policy` is small."""
    pytest.importorskip("gradio", reason="the web page needs gradio")
    from llava_piip.serve.web_page import build_page, serve_page

    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path / "uploads"))
    monkeypatch.setenv("GRADIO_HEARTBEAT_INTERVAL", "0.5")
    pages = []

    def serve(web, port):
        pages.append(build_page(web, examples=files[:1], title="a <b>model</b>"))
        return serve_page(pages[-1], web.limits, host="127.0.0.1", port=port, block=False)

    yield serve
    for page in pages:
        page.close(verbose=False)
