"""Which hosts a server answers to, over a socket."""

import argparse
import http.client
import json
import socket
import threading
from contextlib import contextmanager

import pytest
import uvicorn

from llava_piip.serve.application import ServerSettings, create_app
from llava_piip.serve.engine import Engine
from llava_piip.serve.hosts import allowed_names, is_loopback
from llava_piip.serve.replicas import add_replica_arguments
from llava_piip.serve.server import server_settings
from piip_core.errors import ConfigError


@contextmanager
def serving(app):
    """Port of a server of an application without its start and end."""
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning", lifespan="off"))
    with socket.create_server(("127.0.0.1", 0)) as listening:
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
        thread.start()
        try:
            yield listening.getsockname()[1]
        finally:
            server.should_exit = True
            thread.join(20)


def ask(port, *hosts, path="/v1/models"):
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    connection.putrequest("GET", path, skip_host=True)
    for host in hosts:
        connection.putheader("Host", host)
    connection.endheaders()
    answer = connection.getresponse()
    return answer.status, answer.read()


HERE = ["localhost", "LocalHost:8000", "localhost.", "127.0.0.1", "127.0.0.1:1", "127.8.8.8", "[::1]", "[::1]:8000"]
HERE += ["[0:0::1]:80", "[::ffff:127.0.0.1]"]
ALLOWED = ["Chat.Example", "chat.example.:443", "10.0.0.5:9", "[fe80::0:1]:80"]
ELSEWHERE = ["rebound.example", "localhost.example:8000", "127.0.0.1.example", "10.0.0.6", "0.0.0.0:8000", "127.1"]
ELSEWHERE += ["2130706433", "[::2]:8000", "[::ffff:10.0.0.6]", "x.chat.example"]
MALFORMED = ["", "::1", "localhost:8000:1", "user@localhost", "localhost/", "[::1", "[127.0.0.1]", "[::1%lo]:80", "a b"]


def test_requests_for_other_hosts_never_reach_the_application(tiny_chat):
    settings = ServerSettings(name="tiny", allowed_hosts=allowed_names(["chat.example", "10.0.0.5", "FE80::1"]))
    with serving(create_app(Engine(tiny_chat), settings)) as port:
        for host in HERE + ALLOWED:
            assert ask(port, host)[0] == 200, host
        for status, hosts in ((421, ELSEWHERE), (400, MALFORMED)):
            for host in hosts:
                for path in ("/v1/models", "/health", "/nothing"):
                    given, body = ask(port, host, path=path)
                    error = json.loads(body)["error"] if body.startswith(b"{") else None
                    assert given == status, host
                    # what is malformed may be the server's own refusal, which comes before the application
                    assert (error is None and status == 400) or error["param"] == "Host", host
        assert ask(port)[0] == ask(port, "localhost", "rebound.example")[0] == 400
    with serving(create_app(Engine(tiny_chat), ServerSettings(name="tiny"))) as port:
        assert ask(port, "rebound.example")[0] == 200


@pytest.mark.parametrize(
    ("arguments", "key", "expected"),
    [
        ([], "", ()),
        (["--host", "::1"], "", ()),
        (
            ["--host", "localhost", "--allowed-host", "Chat.Example", "--allowed-host", "::2"],
            "",
            ("chat.example", "::2"),
        ),
        ([], "secret\n", None),
        (["--host", "0.0.0.0"], "", None),
        (["--host", "0.0.0.0", "--allowed-host", "a"], "secret", ("a",)),
    ],
)
def test_hosts_are_checked_where_only_this_machine_is_meant(arguments, key, expected, monkeypatch):
    monkeypatch.setenv("PIIP_API_KEY", key)
    parser = argparse.ArgumentParser()
    add_replica_arguments(parser)
    settings = server_settings(parser.parse_args(["--model", "tiny", *arguments]))
    assert settings.allowed_hosts == expected and settings.api_key == (key.strip() or None)
    assert "secret" not in repr(settings)


def test_names():
    assert all(map(is_loopback, ("localhost", "::1", "127.0.0.2")))
    assert not any(map(is_loopback, ("0.0.0.0", "::", "example", "")))
    for wrong in ("chat.example:80", "http://chat.example", "*", "", "[::1]:80"):
        with pytest.raises(ConfigError, match="--allowed-host"):
            allowed_names([wrong])
