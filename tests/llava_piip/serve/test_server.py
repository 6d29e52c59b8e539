"""The real client of OpenAI against the real server, over a socket."""

import asyncio
import http.client
import json
import socket
import threading
import time
from contextlib import contextmanager

import openai
import pytest
import uvicorn
from prometheus_client.parser import text_string_to_metric_families

from llava_piip.serve.application import ServerSettings, create_app
from llava_piip.serve.engine import Engine, EngineSettings

NAME = "tiny"


@contextmanager
def serving(chat, *, max_batch=8, **settings):
    """A server with a model, on a free port of this machine: its port and engine."""
    engine = Engine(chat, EngineSettings(max_batch=max_batch))
    app = create_app(engine, ServerSettings(name=NAME, **settings))
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=60))
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
        thread.start()
        wait_until(lambda: server.started)
        try:
            yield listening.getsockname()[1], engine
        finally:
            server.should_exit = True
            thread.join(60)
    assert not thread.is_alive() and not engine.alive


def wait_until(condition, seconds=60):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "not in time"
        time.sleep(0.01)


def client(port, key="any"):
    return openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key=key, max_retries=0, timeout=30)


def question(text, *uris):
    parts = [{"type": "image_url", "image_url": {"url": uri}} for uri in uris]
    return [{"role": "user", "content": [*parts, {"type": "text", "text": text}]}]


def expected(chat, text, images, new_tokens):
    """The answer without the server."""
    messages = [{"role": "user", "content": [*({"type": "image"} for _ in images), {"type": "text", "text": text}]}]
    return "".join(chat.stream(messages, images, max_new_tokens=new_tokens))


def metrics(port):
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    connection.request("GET", "/metrics")
    families = text_string_to_metric_families(connection.getresponse().read().decode())
    return {(sample.name, *sample.labels.values()): sample.value for family in families for sample in family.samples}


def test_answers_and_streams(tiny_chat, pictures, data_uri):
    first, second = pictures[:2]
    answer = expected(tiny_chat, "What is it?", [first], 12)
    both = expected(tiny_chat, "What are they?", [first, second], 12)
    assert answer and both and answer != both
    with serving(tiny_chat) as (port, _):
        asked = client(port)
        assert [model.id for model in asked.models.list()] == [NAME]
        assert asked.models.retrieve(NAME).id == NAME
        plain = asked.chat.completions.create(
            model=NAME, messages=question("What is it?", data_uri(first)), max_tokens=12, temperature=0
        )
        assert plain.choices[0].message.content == answer and plain.choices[0].finish_reason == "length"
        assert plain.usage.completion_tokens == 12
        assert plain.usage.total_tokens == 12 + plain.usage.prompt_tokens
        stream = asked.chat.completions.create(
            model=NAME,
            messages=question("What are they?", data_uri(first), data_uri(second)),
            max_completion_tokens=12,
            stream=True,
            stream_options={"include_usage": True},
        )
        chunks = list(stream)
        pieces = [chunk.choices[0].delta.content for chunk in chunks if chunk.choices]
        assert "".join(piece or "" for piece in pieces) == both and len(pieces) > 4
        assert chunks[0].choices[0].delta.role == "assistant"
        assert [chunk.choices[0].finish_reason for chunk in chunks[-2:-1]] == ["length"]
        assert chunks[-1].choices == [] and chunks[-1].usage.completion_tokens == 12
        dialogue = [
            {"role": "developer", "content": "Be short."},
            *question("What is it?", data_uri(first)),
            {"role": "assistant", "content": "A thing."},
            {"role": "user", "content": "Which?"},
        ]
        assert asked.chat.completions.create(model=NAME, messages=dialogue, max_tokens=3).usage.completion_tokens == 3
        counted = metrics(port)
        assert counted["piip_requests_total", "200"] == 3 and counted["piip_images_total",] == 4
        assert counted["piip_answer_tokens_total",] == 27 and counted["piip_requests_active",] == 0


def test_many_clients_at_a_time_get_their_own_answers(tiny_chat, pictures, data_uri):
    texts = [f"What is it {'again ' * (number % 3)}?" for number in range(len(pictures))]
    answers = [expected(tiny_chat, text, [image], 10) for text, image in zip(texts, pictures, strict=True)]
    assert len(set(answers)) > 6
    found = {}

    def ask(port, number):
        stream = client(port).chat.completions.create(
            model=NAME, messages=question(texts[number], data_uri(pictures[number])), max_tokens=10, stream=True
        )
        found[number] = "".join(chunk.choices[0].delta.content or "" for chunk in stream)

    with serving(tiny_chat, max_batch=5) as (port, _):
        threads = [threading.Thread(target=ask, args=(port, number)) for number in range(len(texts))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert [found[number] for number in range(len(texts))] == answers


def test_bad_requests_name_their_field(tiny_chat, pictures, data_uri):
    good = {"model": NAME, "messages": question("Hi", data_uri(pictures[0])), "max_tokens": 2}
    where = "messages.0.content.0.image_url.url"
    cases = [
        ({"model": "other"}, 404, "model"),
        ({"temperature": 3}, 400, "temperature"),
        ({"temperature": 1e-300}, 400, "temperature"),
        ({"n": 2}, 400, "n"),
        ({"messages": []}, 400, "messages"),
        ({"messages": [{"role": "user"}]}, 400, "messages.0.content"),
        ({"messages": [{"role": "assistant", "content": "Hi"}]}, 400, "messages"),
        ({"messages": question("Is <image> it?", data_uri(pictures[0]))}, 400, "messages.0.content"),
        ({"messages": question("Hi", "data:image/png;base64,aGVsbG8=")}, 400, where),
        ({"messages": question("Hi", "https://127.0.0.1/a.png")}, 400, where),
        ({"messages": question("Hi", "http://example.org/a.png")}, 400, where),
        ({"messages": question("Hi", "file:///etc/passwd")}, 400, where),
        ({"messages": question("Hi", *[data_uri(pictures[0])] * 9)}, 400, "messages"),
        ({"messages": question("Hi " * 600)}, 400, "messages"),
        ({"max_tokens": 100_000}, 400, "messages"),
        ({"tools": [{"type": "function"}]}, 400, "tools"),
        ({"seed": 1}, 400, "seed"),
        ({"messages": question("x" * 200_000)}, 413, None),
    ]
    with serving(tiny_chat, max_body=150_000) as (port, _):
        for change, status, field in cases:
            for stream in (False, True):
                with pytest.raises(openai.APIStatusError) as caught:
                    client(port).chat.completions.create(**{**good, **change, "stream": stream})
                assert (caught.value.status_code, caught.value.param) == (status, field), change
                assert caught.value.type == "invalid_request_error" and (field or "bytes") in caught.value.message
        for kind, body, status in (("text/plain", b"{}", 415), ("application/json", b"{", 400)):
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
            connection.request("POST", "/v1/chat/completions", body, {"Content-Type": kind})
            answer = connection.getresponse()
            assert answer.status == status and json.loads(answer.read())["error"]["message"]
        for path in ("/v1/nothing", "/docs", "/openapi.json"):
            connection.request("GET", path)
            answer = connection.getresponse()
            assert answer.status == 404 and json.loads(answer.read())["error"]["type"] == "invalid_request_error"
        assert client(port).chat.completions.create(**good).usage.completion_tokens == 2
        assert metrics(port)["piip_requests_active",] == 0


def test_key(tiny_chat):
    with serving(tiny_chat, api_key="secret") as (port, _):
        assert len(client(port, "secret").models.list().data) == 1
        for wrong in ("secre", "secret2", "gehéim"):
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
            for method, path in (("POST", "/v1/chat/completions"), ("GET", "/v1/models"), ("GET", "/metrics")):
                connection.request(method, path, headers={"Authorization": f"Bearer {wrong}".encode()})
                answer = connection.getresponse()
                body = answer.read()
                assert answer.status == 401 and b"secret" not in body
        connection.request("GET", "/health")
        assert connection.getresponse().status == 200


LONG = {"model": NAME, "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 380}


def raw_request(port, **fields):
    """Sends a request and reads nothing."""
    body = json.dumps(LONG | fields).encode()
    opened = socket.create_connection(("127.0.0.1", port))
    opened.sendall(
        b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        b"Content-Length: %d\r\n\r\n%s" % (len(body), body)
    )
    return opened


def test_full_house_and_clients_that_go_away(tiny_chat):
    with serving(tiny_chat, max_batch=2, max_waiting=2) as (port, engine):
        asked = client(port)  # made before: it takes long, and the four must still be there
        gone = [raw_request(port, stream=bool(number % 2)) for number in range(4)]
        wait_until(lambda: metrics(port)["piip_requests_active",] == 4)
        with pytest.raises(openai.RateLimitError) as refused:
            asked.chat.completions.create(**LONG)
        assert int(refused.value.response.headers["Retry-After"]) >= 1 and refused.value.code == "overloaded"
        for opened in gone:
            opened.close()
        wait_until(lambda: metrics(port)["piip_requests_active",] == 0)
        wait_until(lambda: not engine._manager.batch_processor.scheduler.has_pending_requests())
        counted = metrics(port)
        assert counted["piip_requests_total", "cancelled"] == 4 and counted["piip_requests_total", "429"] == 1
        assert client(port).chat.completions.create(**LONG | {"max_tokens": 2}).usage.completion_tokens == 2


def test_time_out(tiny_chat):
    with serving(tiny_chat, timeout=0.15) as (port, _):
        with pytest.raises(openai.InternalServerError) as caught:
            client(port).chat.completions.create(**LONG)
        assert caught.value.status_code == 504 and caught.value.code == "timeout"
        with pytest.raises(openai.APIError, match="in time"):
            list(client(port).chat.completions.create(**LONG, stream=True))
        half = socket.create_connection(("127.0.0.1", port))  # a client that never sends what it announced
        half.sendall(
            b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\n"
            b"Content-Type: application/json\r\nContent-Length: 9\r\n\r\n{"
        )
        assert b" 504 " in half.recv(1000).partition(b"\r\n")[0]
        wait_until(lambda: metrics(port)["piip_requests_active",] == 0)


def test_failure_inside_leaks_nothing(tiny_chat, monkeypatch, caplog):
    with serving(tiny_chat) as (port, engine):

        def broken(*_):
            raise RuntimeError("path/to/secret")

        monkeypatch.setattr(engine, "_prepared", broken)
        with pytest.raises(openai.InternalServerError) as caught:
            client(port).chat.completions.create(**LONG)
        assert caught.value.status_code == 500 and "secret" not in caught.value.response.text
        monkeypatch.undo()
        monkeypatch.setattr(engine._features, "embed", broken)
        with pytest.raises(openai.APIError) as caught:
            list(client(port).chat.completions.create(**LONG, stream=True))
        assert "secret" not in str(caught.value)
        with pytest.raises(openai.InternalServerError) as caught:
            client(port).chat.completions.create(**LONG)
        assert caught.value.status_code == 503 and "secret" not in caught.value.response.text
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
        connection.request("GET", "/health")
        assert connection.getresponse().status == 503
    assert "path/to/secret" in caplog.text  # but the log has it


def test_running_answers_are_finished_when_the_server_ends(tiny_chat):
    results = []
    with serving(tiny_chat) as (port, _):
        thread = threading.Thread(target=lambda: results.append(client(port).chat.completions.create(**LONG)))
        thread.start()
        wait_until(lambda: metrics(port)["piip_requests_active",] == 1)
    thread.join()
    assert results[0].usage.completion_tokens == LONG["max_tokens"]


def test_client_that_does_not_read_is_let_go(tiny_chat):
    body = json.dumps(LONG | {"stream": True}).encode()
    headers = [(b"content-type", b"application/json")]
    sent = []
    scope = {"type": "http", "method": "POST", "path": "/v1/chat/completions", "headers": headers, "query_string": b""}

    async def main():
        nonlocal sent
        loop, passed = asyncio.get_running_loop(), 0
        loop.time = lambda: time.monotonic() + passed  # the time-out comes when the client stops, however slow it was
        engine = Engine(tiny_chat, EngineSettings())
        app = create_app(engine, ServerSettings(name=NAME, timeout=100))
        messages = iter([{"type": "http.request", "body": body}])

        async def receive():
            return next(messages, None) or await asyncio.Event().wait()

        async def send(message):
            nonlocal passed
            sent.append(message)
            if len(sent) > 3:
                passed = 102
                await asyncio.Event().wait()

        await engine.start()
        try:
            await asyncio.wait_for(app(scope, receive, send), 1000)
            assert len(sent) == 4 and not engine._manager.output_router.result_handlers
            sent = []
            await app(scope | {"method": "GET", "path": "/metrics"}, receive, send)
            assert b"piip_requests_active 0.0" in sent[1]["body"]
        finally:
            await engine.stop()

    asyncio.run(main())
