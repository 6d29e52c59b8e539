"""Two replicas by Ray Serve, as a process: what clients see, also when one is killed.

Takes a minute or two and most of the machine, so it runs with PIIP_TEST_REPLICAS=1 only.
"""

import asyncio
import collections
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time

import httpx
import openai
import psutil
import pytest
from prometheus_client.parser import text_string_to_metric_families

from llava_piip.serve.replicas import RAY_ENVIRONMENT, main
from piip_core.errors import UserError

if "PIIP_TEST_REPLICAS" not in os.environ:
    pytest.skip("PIIP_TEST_REPLICAS=1 tests replicas by Ray Serve", allow_module_level=True)
pytest.importorskip("ray", reason="replicas need ray[serve]")
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:ray")  # import of ray.serve

KEY, CLIENTS, NEW_TOKENS = "secret", 6, 60


@pytest.fixture(scope="module")
def running(saved_chat, tmp_path_factory, free_port):
    """Two replicas of a tiny model: their process and port."""
    _, folder = saved_chat
    log, port = tmp_path_factory.mktemp("replicas") / "log", free_port()
    options = ["--replicas", "2", "--device", "cpu", "--max-batch", "4", "--max-waiting", "8", "--timeout", "10"]
    options += ["--model", str(folder), "--port", port, "--allowed-host", "chat.example"]
    # paths of sockets must be short
    with tempfile.TemporaryDirectory(prefix="ray", ignore_cleanup_errors=True) as short, log.open("w") as output:
        environment = os.environ | {"PIIP_API_KEY": KEY, "RAY_TMPDIR": short, "RAY_AUTH_TOKEN": "0" * 64}
        command = [sys.executable, "-m", "llava_piip.serve.replicas", *options]
        with subprocess.Popen(command, env=environment, stdout=output, stderr=output) as process:
            try:
                wait_until(lambda: "replicas: 2, at" in log.read_text() or process.poll() is not None, 400)
                assert process.poll() is None, log.read_text()
                yield process, int(port)
            finally:
                for each in [*children(process), process]:
                    each.kill()


def children(process):
    return psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []


def wait_until(condition, seconds=120):  # a busy machine takes long to start a replica
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "not in time"
        time.sleep(0.05)


def get(port, path, **headers):
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    connection.request("GET", path, headers={"Authorization": f"Bearer {KEY}", **headers})
    answer = connection.getresponse()
    return answer.status, answer.read().decode()


def metrics(port):
    """Values by name, replica and other labels; empty while a replica is being lost."""
    status, text = get(port, "/metrics")
    found = {}
    for family in text_string_to_metric_families(text if status == 200 else ""):
        for sample in family.samples:
            labels = dict(sample.labels)
            found[(sample.name, labels.pop("replica"), *labels.values())] = sample.value
    return found


def total(port, *name):
    return sum(value for (first, _, *rest), value in metrics(port).items() if (first, *rest) == name)


def replica_names(port):
    return {replica for name, replica, *_ in metrics(port) if name == "piip_requests_active"}


def question(text, picture):
    parts = [{"type": "image_url", "image_url": {"url": picture}}, {"type": "text", "text": text}]
    return [{"role": "user", "content": parts}]


def expected(chat, messages, image, new_tokens):
    """The answer without a server."""
    content = [{"type": "image"}, messages[0]["content"][1]]
    return "".join(chat.stream([{"role": "user", "content": content}], [image], max_new_tokens=new_tokens))


class Load:
    """Clients that ask one question after the other until they are told to stop; keeps what each request came to."""

    def __init__(self, port, questions, answers):
        self.port, self.questions, self.answers = port, questions, answers
        self.stop, self.outcomes, self.begun = threading.Event(), collections.Counter(), 0
        self.thread = threading.Thread(target=lambda: asyncio.run(self._run()))

    async def _run(self):
        url = f"http://127.0.0.1:{self.port}/v1"
        async with openai.AsyncOpenAI(base_url=url, api_key=KEY, max_retries=0, timeout=60) as client:
            await asyncio.gather(*(self._ask_on(client, number) for number in range(CLIENTS)))

    async def _ask_on(self, client, number):
        while not self.stop.is_set():
            number = (number + CLIENTS + 1) % len(self.questions)
            self.begun += 1
            self.outcomes[await self._outcome(client, number)] += 1

    async def _outcome(self, client, number):
        asked = dict(model="tiny", messages=self.questions[number], max_tokens=NEW_TOKENS, temperature=0)
        text, streamed = "", bool(number % 2)
        try:
            if streamed:
                async for chunk in await client.chat.completions.create(**asked, stream=True):
                    text += chunk.choices[0].delta.content or ""
            else:
                text = (await client.chat.completions.create(**asked)).choices[0].message.content
        except openai.APIStatusError as error:
            return f"status {error.status_code}" if not text else "wrong"
        except (openai.APIError, httpx.TransportError) as error:
            return type(error).__name__ if self.answers[number].startswith(text) else "wrong"
        return "right" if text == self.answers[number] else "wrong"


def raw_request(port, length=None, **fields):
    """Sends a request and reads nothing; with a length it is shorter than announced."""
    body = json.dumps({"model": "tiny", "messages": [{"role": "user", "content": "Hi"}], **fields}).encode()
    opened = socket.create_connection(("127.0.0.1", port), timeout=30)
    opened.sendall(
        b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        b"Authorization: Bearer %s\r\nContent-Length: %d\r\n\r\n%s" % (KEY.encode(), length or len(body), body)
    )
    return opened


def status_of(opened):
    return int(opened.recv(1000).split()[1])


def test_requests_work_as_on_one_server(running, saved_chat, pictures, data_uri):
    process, port = running
    half = raw_request(port, length=10_000)  # never sends what it announces
    assert get(port, "/health", Authorization="") == (200, '{"status":"ok"}')
    assert get(port, "/v1/models", Authorization="Bearer wrong")[0] == 401
    assert get(port, "/v1/models", Host="rebound.example")[0] == 421
    assert get(port, "/v1/models", Host="chat.example")[0] == 200
    client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key=KEY, max_retries=0, timeout=30)
    assert [model.id for model in client.models.list()] == ["tiny"]
    asked = dict(model="tiny", messages=question("What is it?", data_uri(pictures[0])), max_tokens=12, temperature=0)
    answer = expected(saved_chat[0], asked["messages"], pictures[0], 12)
    plain = client.chat.completions.create(**asked)
    assert plain.choices[0].message.content == answer and plain.usage.completion_tokens == 12
    chunks = list(client.chat.completions.create(**asked, stream=True))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == answer and len(chunks) > 4
    with pytest.raises(openai.BadRequestError) as refused:
        client.chat.completions.create(**asked | {"n": 2})
    assert refused.value.param == "n"

    opened = [raw_request(port, stream=True, max_tokens=380) for _ in range(40)]  # 12 find a place at each replica
    found = collections.Counter(map(status_of, opened))
    assert set(found) == {200, 429} and found[200] > 12, found  # more than one alone takes; the proxy divides unevenly
    for each in opened:
        each.close()
    wait_until(lambda: total(port, "piip_requests_active") == 1)  # that which is half
    assert total(port, "piip_requests_total", "429") == found[429]
    assert total(port, "piip_requests_total", "cancelled") > 6  # some were answered meanwhile
    assert total(port, "piip_requests_total", "200") >= 2 and len(replica_names(port)) == 2
    assert status_of(half) == 504

    listening = {
        connection.laddr.ip
        for child in children(process)
        if "ray::ServeReplica" not in "".join(child.cmdline())  # listen for each other, and want Ray's token
        for connection in child.net_connections("tcp")
        if connection.status == psutil.CONN_LISTEN
    }
    assert listening <= {"127.0.0.1", "::ffff:127.0.0.1", "::1"}


def test_a_killed_replica_costs_its_requests_an_error_and_nothing_else(running, saved_chat, pictures, data_uri):
    process, port = running
    asked = [question(f"What is it, {number}?", data_uri(image)) for number, image in enumerate(pictures)]
    answers = [
        expected(saved_chat[0], messages, image, NEW_TOKENS) for messages, image in zip(asked, pictures, strict=True)
    ]
    assert len(set(answers)) == len(answers)
    before = replica_names(port)
    assert len(before) == 2
    load = Load(port, asked, answers)
    load.thread.start()
    try:
        wait_until(lambda: load.outcomes["right"] >= 2 * CLIENTS, 240)
        replicas = [child for child in children(process) if "ray::ServeReplica" in "".join(child.cmdline())]
        assert len(replicas) == 2
        wait_until(lambda: all(metrics(port)["piip_requests_active", name] > 0 for name in before))
        replicas[0].send_signal(signal.SIGKILL)
        killed = time.monotonic()
        wait_until(lambda: len(replica_names(port)) == 2 and replica_names(port) != before, 240)
        print(f"two replicas again after {time.monotonic() - killed:.1f} s")
        right = load.outcomes["right"]
        wait_until(lambda: load.outcomes["right"] >= right + 2 * CLIENTS, 240)
    finally:
        load.stop.set()
        load.thread.join(60)
    print(dict(load.outcomes))
    assert not load.thread.is_alive() and load.outcomes.total() == load.begun
    lost = set(load.outcomes) - {"right"}
    # 504: the other replica could not take it in time
    assert lost and lost <= {"status 500", "status 504", "APIConnectionError", "RemoteProtocolError", "APIError"}


def test_sigterm_lets_answers_finish(running):
    process, port = running
    client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key=KEY, max_retries=0, timeout=30)
    stream = client.chat.completions.create(
        model="tiny", messages=[{"role": "user", "content": "Hi"}], max_tokens=200, stream=True
    )
    chunks = [next(iter(stream))]
    process.send_signal(signal.SIGTERM)
    started = children(process)
    chunks += list(stream)
    assert chunks[-1].choices[0].finish_reason == "length"
    assert process.wait(30) == 0
    assert psutil.wait_procs(started, timeout=10)[1] == []


def test_mistakes_are_told_without_a_traceback(saved_chat, capsys, monkeypatch):
    from llava_piip.serve.deployment import build

    for name, value in RAY_ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    model = ["--model", str(saved_chat[1])]
    with socket.create_server(("127.0.0.1", 0)) as taken:
        for arguments, words in (
            (["--model", "nothing"], "nothing: is no folder"),
            ([*model, "--replicas", "0"], "--replicas 0"),
            ([*model, "--device", "cuda:1", "--gpus-per-replica", "0"], "expected cuda"),
            ([*model, "--gpus-per-replica", "1000"], "1000 GPUs"),
            ([*model, "--cpus-per-replica", "-1"], "--cpus-per-replica -1"),
            ([*model, "--port", str(taken.getsockname()[1])], "cannot listen there"),
        ):
            assert main(arguments) == 2
            assert words in capsys.readouterr().err
    for arguments, words in (
        ({}, "--model"),
        ({"model": "x", "nope": True}, "--nope"),
        ({"model": "x", "replicas": "two"}, "two"),
    ):
        with pytest.raises(UserError, match=words):
            build(arguments)


def test_build_takes_options_by_name(saved_chat, monkeypatch):
    from llava_piip.serve.deployment import build

    monkeypatch.setenv("PIIP_API_KEY", KEY)
    arguments = {
        "model": str(saved_chat[1]),
        "replicas": "3",
        "gpus_per_replica": 0.5,
        "max_batch": 4,
        "max_waiting": 0,
    }
    built = build(arguments | {"allow_http": "true", "no_prefix_sharing": False, "allowed_host": ["a", "b"]})
    deployment = built._bound_deployment
    options, settings, engine = deployment.init_args
    assert options.model == arguments["model"] and deployment.num_replicas == 3
    assert deployment.ray_actor_options["num_gpus"] == 0.5 and deployment.max_ongoing_requests > 4
    assert settings.fetch.allow_http and settings.allowed_hosts == ("a", "b") and settings.api_key == KEY
    assert engine.share_prefixes and engine.max_batch == 4
