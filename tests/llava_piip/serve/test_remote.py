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
from llava_piip.serve.dialogue import Conversation
from llava_piip.serve.remote import RemoteModel
from piip_core.errors import UserError

pytest.importorskip("openai")

QUESTION = [{"role": "user", "content": "Well?"}]


def events(*pieces, reason="stop"):
    """The stream of an answer in pieces."""
    chunks = [{"delta": {"content": piece}, "finish_reason": None} for piece in pieces]
    lines = [json.dumps({"choices": [chunk]}) for chunk in (*chunks, {"delta": {}, "finish_reason": reason})]
    return "".join(f"data: {line}\n\n" for line in [*lines, "[DONE]"])


class Server(BaseHTTPRequestHandler):
    """Answers as it is prepared, and remembers what it was sent."""

    models, status, answer, missing = json.dumps({"data": [{"id": "far"}]}), 200, events("  A", " cup."), 0

    def do_GET(self):
        self.reply("application/json", self.models)

    def do_POST(self):
        self.asked.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
        self.keys.append(self.headers["Authorization"])
        self.reply("text/event-stream", self.answer, self.missing)

    def reply(self, kind, body, missing=0):
        self.send_response(self.status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body) + missing))
        self.end_headers()
        self.wfile.write(body.encode())

    def log_message(self, *_):
        pass


@pytest.fixture
def server():
    """The handler, whose attributes may be set, and its address."""
    handler = type("Prepared", (Server,), {"asked": [], "keys": []})
    running = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    yield handler, f"http://127.0.0.1:{running.server_port}/v1"
    running.shutdown()
    running.server_close()


def shown(part):
    """What a part of a message is: its text, or the colour of its image."""
    if part["type"] == "text":
        return part["text"]
    data = part["image_url"]["url"].removeprefix("data:image/png;base64,")
    return Image.open(io.BytesIO(base64.b64decode(data))).getpixel((0, 0))


def test_images_go_where_their_parts_stand_in_every_round(server, monkeypatch):
    handler, address = server
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    chat, settings = RemoteModel(address), {"max_new_tokens": 7, "temperature": 0.5, "top_p": 0.9}
    images = [Image.new("RGB", (4, 4), color) for color in ((1, 2, 3), (4, 5, 6), (7, 8, 9))]
    conversation = Conversation("Be brief.", pending=[*zip("ab", images, strict=False)])
    conversation.ask("Is <image> like it?")
    assert list(conversation.answer(chat, **settings)) == ["A", " cup."]
    conversation.pending = [("c", images[2])]
    conversation.ask("And this?")
    assert "".join(conversation.answer(chat)) == "A cup." and conversation.stream.finish_reason == "stop"
    sent, again = handler.asked
    assert sent["messages"][0] == {"role": "system", "content": "Be brief."}
    assert [shown(part) for part in sent["messages"][1]["content"]] == [(1, 2, 3), (4, 5, 6), "Is <image> like it?"]
    assert again["messages"][:2] == sent["messages"] and again["messages"][2]["content"] == "A cup."
    assert [shown(part) for part in again["messages"][3]["content"]] == [(7, 8, 9), "And this?"]
    values = {"model": "far", "stream": True, "temperature": 0.5, "top_p": 0.9, "max_tokens": 7}
    assert sent == {"messages": sent["messages"], **values} and "max_tokens" not in again
    assert handler.keys == ["Bearer secret"] * 2


def test_parts_keep_their_order(server):
    handler, address = server
    content = [{"type": "text", "text": "Is"}, {"type": "image"}, {"type": "text", "text": "red?"}]
    list(RemoteModel(address, "mine").stream([{"role": "user", "content": content}], [Image.new("RGB", (4, 4), "red")]))
    [sent] = handler.asked
    assert [shown(part) for part in sent["messages"][0]["content"]] == ["Is", (255, 0, 0), "red?"]
    assert sent["model"] == "mine"


def test_an_answer_can_be_stopped_and_cut(server):
    handler, address = server
    model = RemoteModel(address)
    with model.stream(QUESTION, []) as stream:
        assert next(iter(stream)) == "A"
        stream.close()
        assert list(stream) == [] and stream.finish_reason == "cancelled"
    handler.answer = events("A cup", reason="length")
    stream = model.stream(QUESTION, [])
    assert "".join(stream) == "A cup" and stream.finish_reason == "length"


def test_a_stopped_answer_stays_in_the_conversation_and_is_closed(server):
    conversation = Conversation()
    conversation.ask("Well?")
    pieces = conversation.answer(RemoteModel(server[1]))
    assert next(pieces) == "A"
    pieces.close()
    assert conversation.messages[-1]["content"] == "A" and conversation.stream.finish_reason == "cancelled"
    assert list(conversation.stream) == []


@pytest.mark.parametrize("status", [200, 400, 401, 404])
def test_what_the_server_refuses_is_told_in_one_line(server, status):
    handler, address = server
    model = RemoteModel(address)
    handler.status, handler.answer = status, json.dumps({"error": {"message": "too\nmany \x1b[2J images"}})
    expected = {401: "set OPENAI_API_KEY", 404: "with --model a name that it knows"}.get(status, "its log")
    if status == 200:  # within the stream
        handler.answer, expected = f"data: {handler.answer}\n\n", "expected a running OpenAI-compatible server"
    with pytest.raises(UserError) as told:
        list(model.stream(QUESTION, []))
    message = str(told.value)
    assert message.startswith(f"--server {address}: ") and expected in message
    assert message.isprintable() and ("too many [2J images" in message or r"too\nmany \x1b[2J images" in message)


@pytest.mark.parametrize(
    "answer", ["", "<html></html>", "data: {broken\n\n", "data: [3]\n\n", "data: [DONE]\n\n", None]
)
def test_a_broken_answer_is_an_error(server, answer):
    handler, address = server
    handler.answer, handler.missing = (events("A")[:-100], 99) if answer is None else (answer, 0)
    with pytest.raises(UserError, match=rf"--server {address}: .+; expected a running OpenAI-compatible server"):
        list(RemoteModel(address).stream(QUESTION, []))


@pytest.mark.parametrize("models", ["<html>Hello</html>", '["far"]', '{"data": 3}', '{"data": []}', "{", ""])
def test_what_is_no_api_is_told_at_the_start(server, models):
    handler, address = server
    handler.models = models
    with pytest.raises(UserError, match=rf"--server {address}: .+; (expected a running|give the name with --model)"):
        RemoteModel(address)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ["--device", "cpu"],
            "--device with --server http://127.0.0.1:1/v1: the server decides that; leave --device out",
        ),
        (["--dtype", "auto", "--load-in", "4bit"], "--dtype, --load-in with --server"),
        (["--top-p", "0"], "top_p=0.0: expected"),
        ([], "--server http://127.0.0.1:1/v1: Connection error. [Errno 111] Connection refused; expected a running"),
        (["--server", "http://host:port/v1"], "--server http://host:port/v1: Invalid port: 'port'; expected a running"),
    ],
)
def test_options_that_cannot_work_are_told_in_one_line(capsys, options, message):
    assert main(["--server", "http://127.0.0.1:1/v1", *options]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and message in line


def test_a_missing_package_is_told(monkeypatch, capsys):
    monkeypatch.setattr(remote, "openai", None)
    assert main(["--server", "http://127.0.0.1:1/v1"]) == 2
    assert "--server needs openai: pip install --no-build-isolation -e '.[client]'" in capsys.readouterr().err


def test_the_terminal_and_the_page_ask_the_server(server, files, monkeypatch, capsys):
    web_page = pytest.importorskip("llava_piip.serve.web_page", reason="the web page needs gradio")
    handler, address = server
    monkeypatch.setattr("sys.stdin", io.StringIO("What is it?\n"))
    assert main(["--server", address, "--image", str(files[0])]) == 0
    assert capsys.readouterr().out == "A cup.\n"
    chat, question = RemoteModel(address), {"text": "What is it?", "files": [str(files[0])]}
    *_, last = web_page.ask(chat, Conversation(), question, 0.0, 1.0, 8)
    assert last[0][-1]["content"][0]["text"] == "A cup."
    first, second = (sent["messages"][0]["content"] for sent in handler.asked)
    assert first == second and len(first) == 2 and handler.asked[1]["max_tokens"] == 8
    labels = [block.label for block in web_page.build_page(chat).blocks.values() if hasattr(block, "label")]
    assert "Longest answer" in labels and "What each branch looked at" not in labels
