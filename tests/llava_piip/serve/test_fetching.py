"""Fetching pictures for clients that are not trusted: nothing leads inside, nothing is too much.

The servers are on this machine; the fetcher is told that their names have public addresses, and what connects to
those is led back here. The real check decides about every address.
"""

import socket
import ssl
import threading
import time
import zlib
from contextlib import contextmanager

import numpy as np
import pytest

from llava_piip.serve.fetching import (
    FetchError,
    FetchPolicy,
    ImageFetcher,
    is_public_address,
)
from piip_core.errors import UserError

PUBLIC, OTHER = "93.184.215.14", "2606:2800:21f:cb07:6820:80da:af6b:8b2c"

INSIDE = """
    127.0.0.1 127.8.9.1 10.0.0.1 172.16.0.1 172.31.255.255 192.168.1.1 169.254.169.254 100.64.0.1 0.0.0.0
    0.1.2.3 192.0.0.1 192.0.2.1 198.18.0.1 203.0.113.5 224.0.0.1 239.1.1.1 240.0.0.1 255.255.255.255 :: ::1
    ::127.0.0.1 ::ffff:127.0.0.1 ::ffff:7f00:1 ::ffff:169.254.169.254 ::ffff:0:127.0.0.1 64:ff9b::7f00:1
    64:ff9b::10.0.0.1 64:ff9b:1::1 fe80::1 fe80::1%eth0 fec0::1 fc00::1 fd12:3456::1 ff02::1 2001:db8::1
    2001::1 2002:7f00:1::1 2002:a9fe:a9fe::1 3fff::1 100::1 4000::1
""".split()


@pytest.mark.parametrize("address", INSIDE)
def test_addresses_inside(address):
    assert not is_public_address(address)


@pytest.mark.parametrize(
    "address", ["8.8.8.8", "1.1.1.1", "172.32.0.1", PUBLIC, OTHER, "::ffff:8.8.8.8", "64:ff9b::8.8.8.8"]
)
def test_addresses_outside(address):
    assert is_public_address(address)


@pytest.mark.parametrize(
    "host",
    [
        "127.0.0.1",
        "2130706433",
        "0x7f000001",
        "0x7f.0.0.1",
        "0177.0.0.1",
        "017700000001",
        "127.1",
        "127.0.1",
        "0",
        "[::1]",
        "[::]",
        "[0:0:0:0:0:0:0:1]",
        "[::ffff:127.0.0.1]",
        "[::ffff:7f00:1]",
        "[64:ff9b::7f00:1]",
        "[fe80::1]",
        "169.254.169.254",
        "2852039166",
        "0xa9fea9fe",
        "192.168.1",
        "10.1",
        "localhost",
        "LOCALHOST.",
        "①②⑦.⓪.⓪.①",
        "１２７.0.0.1",
        "127。0。0。1",
    ],
)
def test_spellings_of_addresses_inside(host):
    def never(*_):
        raise AssertionError("connected")

    # The system's own resolver reads the spellings
    with pytest.raises(FetchError, match=r"not on the public internet|not a well-formed"):
        ImageFetcher(connect=never).fetch(f"https://{host}/a.png")


@pytest.mark.parametrize(
    "url",
    [
        "http://example.org/a.png",
        "file:///etc/passwd",
        "ftp://example.org/a.png",
        "gopher://example.org/",
        "//example.org/a.png",
        "/etc/passwd",
        "a.png",
        "",
        "https://",
        "https:///a.png",
        "https://user@example.org/a.png",
        "https://user:password@example.org/a.png",
        "https://example.org:0/a.png",
        "https://example.org:99999/a.png",
        "https://example.org\\@127.0.0.1/",
        "https://example.org/a b.png",
        "https://example.org/a\r\nHost: inside",
        "\thttps://example.org/a.png",
        "https://exa\tmple.org/",
        "https://[::1/",
        "https://a..b/",
        "https://" + "a" * 64 + ".org/",
        "https://example\ud800.org/",
    ],
)
def test_addresses_that_are_refused_before_anything_is_asked(url):
    def never(*_):
        raise AssertionError("asked")

    with pytest.raises(FetchError) as caught:
        ImageFetcher(resolve=never, connect=never).fetch(url, field="here")
    assert caught.value.field == "here" and str(caught.value).startswith("here: ")
    assert isinstance(caught.value, UserError)


@pytest.fixture
def picture(png, pictures):
    return png(pictures[0])


def reply(body=b"", status="200 OK", **headers):
    lines = [f"HTTP/1.1 {status}", *(f"{name.replace('_', '-')}: {value}" for name, value in headers.items())]
    return "\r\n".join([*lines, "", ""]).encode() + body


@contextmanager
def answering(*replies):
    """A server on this machine that answers one connection after the other: its address, and requests it gets.

    A reply is bytes, or a function that writes to the connection.
    """
    requests = []
    listening = socket.create_server(("127.0.0.1", 0))

    def serve():
        for answer in replies:
            try:
                connection, _ = listening.accept()
            except OSError:
                return
            with connection:
                requests.append(connection.recv(10_000).decode())
                try:
                    answer(connection) if callable(answer) else connection.sendall(answer)
                except OSError:
                    pass

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    try:
        yield listening.getsockname(), requests
    finally:
        listening.close()


class Plain(ssl.SSLContext):
    """Takes part in no encryption, and notes which name a certificate would have to be for."""

    names: list[str]

    def wrap_socket(self, sock, server_hostname=None, **_):
        assert self.check_hostname and self.verify_mode == ssl.CERT_REQUIRED
        self.names.append(server_hostname)
        return sock


def fetcher(address, names, *, connected=None, context=None, **policy):
    """One for which these names have these addresses, and which is led to the server on this machine."""

    def connect(to, port, timeout):
        assert is_public_address(to) and 0 < timeout <= 10
        if connected is not None:
            connected.append((to, port))
        return socket.create_connection(address, timeout=timeout)

    return ImageFetcher(
        FetchPolicy(**{"allow_http": True, "timeout": 5.0} | policy),
        resolve=lambda host, port: names.get(host, (host,)),
        connect=connect,
        ssl_context=context,
    )


def test_picture_from_an_address(picture, pictures):
    connected = []
    with answering(reply(picture, Content_Length=len(picture))) as (address, requests):
        one = fetcher(address, {"host": (PUBLIC, OTHER)}, connected=connected)
        image = one.fetch("http://host:81/äb%20?q=1#place")
    assert np.array_equal(np.asarray(image), np.asarray(pictures[0])) and image.mode == "RGB"
    assert connected == [(PUBLIC, 81)]  # the address that was checked
    assert requests[0].startswith("GET /%C3%A4b%20?q=1 HTTP/1.1\r\n") and "\r\nHost: host:81\r\n" in requests[0]
    assert "accept-encoding: identity" in requests[0].lower()


def test_certificate_is_asked_for_the_name(picture):
    context = Plain(ssl.PROTOCOL_TLS_CLIENT)
    context.names, connected = [], []
    with answering(reply(picture, Content_Length=len(picture))) as (address, requests):
        fetcher(address, {"host": (PUBLIC,)}, context=context, connected=connected).fetch("https://host/a.png")
    assert context.names == ["host"] and connected == [(PUBLIC, 443)] and "\r\nHost: host\r\n" in requests[0]
    default = ImageFetcher()._ssl_context
    assert default.verify_mode == ssl.CERT_REQUIRED and default.check_hostname


def test_name_with_one_address_inside_is_refused(picture):
    with answering(reply(picture)) as (address, requests):
        for inside in ((PUBLIC, "127.0.0.1"), ("::1", OTHER), ("169.254.169.254",), (), ("nonsense",)):
            with pytest.raises(FetchError, match="not on the public internet"):
                fetcher(address, {"host": inside}).fetch("http://host/a.png")
    assert not requests


def test_name_that_changes_its_meaning_is_asked_once(picture):
    answers = iter([(PUBLIC,), ("127.0.0.1",)])
    connected = []
    with answering(reply(picture)) as (address, _):
        one = fetcher(address, {}, connected=connected)
        one._resolve = lambda host, port: next(answers)
        one.fetch("http://host/a.png")
        assert connected == [(PUBLIC, 80)]
        with pytest.raises(FetchError, match="not on the public internet"):
            one.fetch("http://host/a.png")


def test_next_address_where_one_does_not_answer(picture):
    tried = []
    with answering(reply(picture)) as (address, _):
        one = fetcher(address, {"host": (OTHER, PUBLIC)})
        connect = one._connect

        def first_fails(to, port, timeout):
            tried.append(to)
            if to == OTHER:
                raise ConnectionRefusedError
            return connect(to, port, timeout)

        one._connect = first_fails
        one.fetch("http://host/a.png")
    assert tried == [OTHER, PUBLIC]


@pytest.mark.parametrize(
    ("location", "message"),
    [
        ("http://inside/secret", "not on the public internet"),
        ("http://127.0.0.1/", "not on the public internet"),
        ("http://[::ffff:10.0.0.1]/", "not on the public internet"),
        ("//inside/secret", "not on the public internet"),
        ("file:///etc/passwd", "expected an address that starts with"),
        ("data:image/png;base64,aGVsbG8=", "expected an address that starts with"),
        ("http://user:pass@host/", "user or password"),
        ("http://ho st/", "blanks"),
        ("http://[::1/", "could not be read from there"),
    ],
)
def test_redirects_are_checked(location, message):
    with answering(reply(status="302 Found", Location=location)) as (address, requests):
        one = fetcher(address, {"host": (PUBLIC,), "inside": ("10.0.0.7",)})
        with pytest.raises(FetchError, match=message) as caught:
            one.fetch("http://host/a.png")
    assert len(requests) == 1 and "10.0.0.7" not in str(caught.value)


def test_redirects_are_followed_and_end(picture):
    there = reply(status="307 Temporary Redirect", Location="/b/c.png?d")
    with answering(there, reply(picture)) as (address, requests):
        fetcher(address, {"host": (PUBLIC,)}).fetch("http://host/a.png")
    assert requests[1].startswith("GET /b/c.png?d ")
    with answering(*[there] * 9) as (address, requests):
        with pytest.raises(FetchError, match="more than 3 redirects"):
            fetcher(address, {"host": (PUBLIC,)}).fetch("http://host/a.png")
    assert len(requests) == 4


def test_redirect_from_https_to_http():
    context = Plain(ssl.PROTOCOL_TLS_CLIENT)
    context.names = []
    with answering(reply(status="301 Moved", Location="http://host/a.png")) as (address, requests):
        with pytest.raises(FetchError, match="starts with https://"):
            fetcher(address, {"host": (PUBLIC,)}, context=context, allow_http=False).fetch("https://host/a.png")
    assert len(requests) == 1


def test_size_is_counted_whatever_the_server_says():
    sent = []

    def pour(connection):
        connection.sendall(reply(Transfer_Encoding="chunked"))
        for _ in range(1000):
            connection.sendall(b"2000\r\n" + b"x" * 0x2000 + b"\r\n")
            sent.append(0x2000)

    for answer in (pour, reply(b"x" * 60_000), reply(Content_Length=10**12), reply(b"x" * 60_000, Content_Length="-5")):
        with answering(answer) as (address, _):
            with pytest.raises(FetchError, match="more than 50000 bytes"):
                fetcher(address, {"host": (PUBLIC,)}, max_bytes=50_000).fetch("http://host/a.png")
    assert sum(sent) < 8_000_000  # it hung up


def test_time_is_limited_in_all():
    def drip(start):
        def write(connection):
            connection.sendall(start)
            for _ in range(1000):
                time.sleep(0.02)
                connection.sendall(b"x")

        return write

    for answer in (
        drip(b""),
        drip(b"HTTP/1.1 200 OK\r\nX: "),
        drip(reply(Content_Length=10_000)),
        lambda _: time.sleep(20),
    ):
        with answering(answer) as (address, _):
            start = time.monotonic()
            with pytest.raises(FetchError, match=r"not answered within 0.2 seconds"):
                fetcher(address, {"host": (PUBLIC,)}, timeout=0.2).fetch("http://host/a.png")
            assert time.monotonic() - start < 10  # of 20


@pytest.mark.parametrize(
    "answer",
    [
        reply(status="404 Not Found"),
        reply(status="500 Oops"),
        reply(status="302 Found"),
        reply(b"<html>", Content_Type="text/html"),
        reply(b"<svg xmlns='http://www.w3.org/2000/svg'/>", Content_Type="image/svg+xml"),
        reply(b"", Content_Length=0),
        reply(zlib.compress(b"x" * 1000), Content_Encoding="gzip"),
        b"SSH-2.0-OpenSSH_9.0\r\n",
        b"",
        b"HTTP/1.1 200 OK\r\n" + b"X: y\r\n" * 200 + b"\r\n",
    ],
)
def test_what_is_no_picture(answer):
    with answering(answer) as (address, _):
        with pytest.raises(FetchError) as caught:
            fetcher(address, {"host": (PUBLIC,)}).fetch("http://host/a.png")
    for inside in ("127.0.0.1", str(address[1]), PUBLIC, "Errno", "Error", "OpenSSH"):
        assert inside not in str(caught.value)


def test_server_that_is_not_there():
    def refuse(*_):
        raise ConnectionRefusedError(111, "Connection refused by 10.0.0.1")

    one = ImageFetcher(resolve=lambda *_: [PUBLIC], connect=refuse)
    with pytest.raises(FetchError, match=r"^url: the picture could not be read from there$"):
        one.fetch("https://host/a.png")

    def unknown(*_):
        raise socket.gaierror(-2, "Name or service not known")

    with pytest.raises(FetchError, match=r"^url: the host is unknown or not on the public internet$"):
        ImageFetcher(resolve=unknown).fetch("https://host/a.png")


def test_name_that_takes_long_to_look_up():
    released = threading.Event()
    one = ImageFetcher(FetchPolicy(timeout=0.2), resolve=lambda *_: released.wait(20) and [PUBLIC])
    started = time.monotonic()
    try:
        for _ in range(10):  # more than are looked up at a time
            with pytest.raises(FetchError, match=r"^url: not answered within 0\.2 seconds$"):
                one.fetch("https://host/a.png")
        assert time.monotonic() - started < 15
    finally:
        released.set()


def test_number_of_pictures():
    one = ImageFetcher()
    one.check_count(8)
    with pytest.raises(FetchError, match="9 images in one request: at most 8"):
        one.check_count(9)
