"""Terminal and page as clients of an OpenAI-compatible server: what they send, and what they make of the answers."""

import base64
import io
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from PIL import Image

from llava_piip.serve import remote
from llava_piip.serve.chat import main
from llava_piip.serve.remote import RemoteModel
from llava_piip.serve.web_session import WebChat
from piip_core.errors import ConfigError, UserError

pytest.importorskip("openai")


class Server(BaseHTTPRequestHandler):
    """Streams prepared pieces, and remembers what it was sent."""

    pieces, reason, asked, status = ("  A", " cup."), "stop", [], 200
    models = json.dumps({"object": "list", "data": [{"id": "far", "object": "model"}]})
    stream = None  # instead of the pieces

    def do_GET(self):
        self.reply("application/json", self.models)

    def do_POST(self):
        self.asked.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
        chunks = [{"delta": {"content": piece}, "finish_reason": None} for piece in self.pieces]
        chunks.append({"delta": {}, "finish_reason": self.reason})
        lines = [json.dumps({"id": "1", "object": "chat.completion.chunk", "choices": [chunk]}) for chunk in chunks]
        if self.stream is not None:
            self.reply("text/event-stream", self.stream)
        elif self.status == 200:
            self.reply("text/event-stream", "".join(f"data: {line}\n\n" for line in [*lines, "[DONE]"]))
        else:
            self.reply("application/json", json.dumps({"error": {"message": "too many images"}}))

    def reply(self, kind, body):
        self.send_response(self.status)
        self.send_header("Content-Type", kind)
        self.end_headers()
        self.wfile.write(body.encode())

    def log_message(self, *_):
        pass


@pytest.fixture
def server(monkeypatch):
    """The handler, whose attributes may be set, and its address."""
    handler = type("Prepared", (Server,), {"asked": []})
    running = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=running.serve_forever, daemon=True).start()
    yield handler, f"http://127.0.0.1:{running.server_port}/v1"
    running.shutdown()


def shown(part):
    """What a part of a message is: its text, or the colour of its image."""
    if part["type"] == "text":
        return part["text"]
    data = part["image_url"]["url"].removeprefix("data:image/png;base64,")
    return Image.open(io.BytesIO(base64.b64decode(data))).getpixel((0, 0))


def test_images_go_where_their_parts_stand(server):
    handler, address = server
    images = [Image.new("RGB", (4, 4), color) for color in ((1, 2, 3), (4, 5, 6))]
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Is <image>"}, {"type": "image"}]},
    ]
    stream = RemoteModel(address).stream(messages, images, max_new_tokens=7, temperature=0.5, top_p=0.9)
    assert list(stream) == ["A", " cup."] and stream.finish_reason == "stop"
    [sent] = handler.asked
    assert [shown(part) for part in sent["messages"][1]["content"]] == [(1, 2, 3), "Is <image>", (4, 5, 6)]
    assert sent["messages"][0] == messages[0] and (sent["model"], sent["max_tokens"]) == ("far", 7)
    assert (sent["temperature"], sent["top_p"], sent["stream"]) == (0.5, 0.9, True)


def test_an_answer_can_be_stopped_and_cut(server):
    handler, address = server
    model, stop = RemoteModel(address, name="mine"), threading.Event()
    with model.stream([{"role": "user", "content": "Hi"}], stop_event=stop) as stream:
        assert next(stream) == "A"
        stop.set()
        assert list(stream) == [] and stream.finish_reason == "cancelled"
    handler.reason = "length"
    stream = model.stream([{"role": "user", "content": "Hi"}])
    assert "".join(stream) == "A cup." and stream.finish_reason == "length" and handler.asked[-1]["model"] == "mine"


def test_what_the_server_refuses_is_told(server, monkeypatch, capsys):
    handler, address = server
    model = RemoteModel(address)
    handler.status = 400
    with pytest.raises(UserError, match=r"the server says: .*too many images"):
        model.stream([{"role": "user", "content": "Hi"}])
    assert main(["--server", address]) == 2 and "names no model" in capsys.readouterr().err
    assert main(["--server", "http://127.0.0.1:1/v1"]) == 2 and "names no model" in capsys.readouterr().err
    assert main([]) == 2 and "--model DIR: expected" in capsys.readouterr().err
    monkeypatch.setattr(remote, "openai", None)
    with pytest.raises(ConfigError, match=r"\[client\]"):
        RemoteModel(address)


def test_the_terminal_and_the_page_ask_the_server(server, files, monkeypatch, capsys):
    handler, address = server
    monkeypatch.setattr("sys.stdin", io.StringIO("What is it?\n"))
    assert main(["--server", address, "--image", str(files[0])]) == 0
    assert capsys.readouterr().out == "A cup.\n"
    web = WebChat(RemoteModel(address))
    last = list(web.ask(web.session(), "What is it?", files[:1], {"max_new_tokens": 8}))[-1]
    assert last.messages[-1]["content"][0]["text"] == "A cup." and not web.is_local
    first, second = (sent["messages"][0]["content"] for sent in handler.asked)
    assert first == second and len(first) == 2


@pytest.mark.parametrize("models", ["<html>Hello</html>", '["far"]', '{"data": 3}', "{", ""])
def test_what_is_no_api_is_told_at_the_start(server, models):
    handler, address = server
    handler.models = models
    with pytest.raises(UserError, match="is it an OpenAI-compatible API"):
        RemoteModel(address)


@pytest.mark.parametrize("stream", ["", "<html></html>", "data: {broken\n\n", "data: [DONE]\n\n"])
def test_a_broken_answer_is_an_error(server, stream):
    handler, address = server
    handler.stream = stream
    with pytest.raises(UserError, match="the server"):
        list(RemoteModel(address).stream([{"role": "user", "content": "Well?"}]))
