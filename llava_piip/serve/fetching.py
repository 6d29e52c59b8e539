"""Pictures that a client names by an address or brings in a data URI.

Whoever may name an address makes this machine open a connection, so that only public hosts are reached: the addresses
that a name resolves to are checked, not its spelling, and the connection goes to an address that was checked, so that
a name cannot change its meaning in between. Every redirect is a new address. Proxies of the environment are not used.
"""

from __future__ import annotations

import base64
import binascii
import http.client
import io
import ipaddress
import re
import socket
import ssl
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from urllib.parse import quote, urljoin, urlsplit

from PIL import Image

from piip_core.errors import UserError

from ..image_processing import ImageError, rgb_image

__all__ = ["FetchError", "FetchPolicy", "ImageFetcher", "decode_image", "fetch_image", "is_public_address"]

FORMATS = ("JPEG", "PNG", "GIF", "WEBP")  # every reader more is one more that meets hostile files
_PORTS = {"https": 443, "http": 80}
_REDIRECTS = (301, 302, 303, 307, 308)
_HEADERS = {"Accept": "image/*", "Accept-Encoding": "identity", "User-Agent": "piip-llava", "Connection": "close"}
_CHUNK = 64 * 1024
_RESOLVING = 8  # names looked up at a time, those among them that nobody waits for any more
_DATA_URI = re.compile(r"data:image/[a-z0-9.+-]+(?:;[a-z0-9=.+-]+)*;base64,", re.IGNORECASE)

_NAT64 = (ipaddress.IPv6Network("64:ff9b::/96"),)
_GLOBAL_UNICAST = ipaddress.IPv6Network("2000::/3")
_NEVER = tuple(
    ipaddress.IPv6Network(network)
    for network in (
        "2001::/23",  # protocol assignments, Teredo among them, which leads to an IPv4 address inside
        "2001:db8::/32",  # documentation
        "2002::/16",  # 6to4: leads to an IPv4 address inside
        "3fff::/20",  # documentation
    )
)

Resolve = Callable[[str, int], Sequence[str]]
Connect = Callable[[str, int, float], socket.socket]


class FetchError(UserError):
    """A picture cannot be had; the message names the field and the fix, and nothing about the network around here.

    Args:
        field: Name of what held the address, such as `messages.0.content.1.image_url.url`.
        reason: What is wrong with it.
    """

    def __init__(self, field: str, reason: str) -> None:
        super().__init__(f"{field}: {reason}")
        self.field = field


@dataclass(frozen=True, kw_only=True)
class FetchPolicy:
    """What is fetched.

    Attributes:
        allow_http: Whether addresses may start with http://, which anybody on the way can read and change.
        max_bytes: Largest picture as a file.
        max_images: Most pictures of one request.
        max_pixels: Largest picture, width times height.
        max_side: Longest side in pixels; pictures are padded to a square of it.
        max_redirects: How often a server may name another address.
        timeout: Seconds until a picture has to be here, redirects included.
    """

    allow_http: bool = False
    max_bytes: int = 10_000_000
    max_images: int = 8
    max_pixels: int = 40_000_000
    max_side: int = 8192
    max_redirects: int = 3
    timeout: float = 10.0


def is_public_address(address: str) -> bool:
    """Whether an IP address belongs to the public internet.

    Private, loopback, link-local, shared, multicast, reserved, documentation and unspecified ones do not. Of an IPv6
    address that stands for an IPv4 address (mapped, NAT64) the latter counts; 6to4 and Teredo are never public.

    Raises:
        ValueError: If it is no IP address.
    """
    found = ipaddress.ip_address(address)
    if isinstance(found, ipaddress.IPv4Address):
        return found.is_global and not (found.is_multicast or found.is_reserved)
    if found.ipv4_mapped is not None:
        return is_public_address(str(found.ipv4_mapped))
    if any(found in network for network in _NAT64):
        return is_public_address(str(ipaddress.IPv4Address(int(found) & 0xFFFFFFFF)))
    return found in _GLOBAL_UNICAST and found.is_global and not any(found in network for network in _NEVER)


def decode_image(data: bytes, *, field: str = "image", policy: FetchPolicy | None = None) -> Image.Image:
    """An RGB picture out of a file's content; the first frame of an animation.

    Raises:
        FetchError: If it is no complete picture of a known format, or too large.
    """
    policy = policy or FetchPolicy()
    if len(data) > policy.max_bytes:
        raise FetchError(field, _too_long(policy))
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            width, height = image.size
            if width * height > policy.max_pixels or max(width, height) > policy.max_side:
                raise FetchError(
                    field,
                    f"the picture has {width} x {height} pixels; at most {policy.max_pixels} in all and "
                    f"{policy.max_side} on a side are taken: make it smaller",
                )
            image.load()
            return rgb_image(image)
    except (FetchError, MemoryError):
        raise
    except Image.DecompressionBombError:
        raise FetchError(field, f"the picture has more than {policy.max_pixels} pixels: make it smaller") from None
    except ImageError as error:
        raise FetchError(field, str(error)) from None
    except Exception:  # readers meet broken content with errors of many types
        raise FetchError(field, f"not a complete picture: expected one of {', '.join(FORMATS)}") from None


def fetch_image(url: str, *, field: str = "url", policy: FetchPolicy | None = None) -> Image.Image:
    """An RGB picture from a public https address or a data URI; see `ImageFetcher.fetch`."""
    return ImageFetcher(policy).fetch(url, field=field)


class ImageFetcher:
    """Fetches pictures for clients that are not trusted. Safe for many threads.

    Args:
        policy: What is fetched.
        resolve: Gives the IP addresses of a host and port; the system's resolver by default.
        connect: Opens a connection to an IP address and port within seconds.
        ssl_context: Checks certificates; the system's trusted ones by default.
    """

    def __init__(
        self,
        policy: FetchPolicy | None = None,
        *,
        resolve: Resolve | None = None,
        connect: Connect | None = None,
        ssl_context: ssl.SSLContext | None = None,
    ) -> None:
        self.policy = policy or FetchPolicy()
        self._resolve = resolve or _system_addresses
        self._connect = connect or _open_connection
        self._ssl_context = ssl_context or ssl.create_default_context()
        # The system's resolver knows no deadline: names of slow servers would hold whoever waits
        self._resolving = ThreadPoolExecutor(_RESOLVING, "resolve")

    def check_count(self, count: int, *, field: str = "messages") -> None:
        """Refuses a request with too many pictures.

        Raises:
            FetchError: If there are more than `policy.max_images`.
        """
        if count > self.policy.max_images:
            raise FetchError(field, f"{count} images in one request: at most {self.policy.max_images} are taken")

    def fetch(self, url: str, *, field: str = "url") -> Image.Image:
        """An RGB picture.

        Args:
            url: https://..., or data:image/...;base64,...
            field: What errors call it.

        Raises:
            FetchError: If the address is malformed, of another scheme or no public one, or what it leads to is not
                a picture that the policy takes.
        """
        return decode_image(self.read(url, field=field), field=field, policy=self.policy)

    def read(self, url: str, *, field: str = "url") -> bytes:
        """The file behind an address, not yet known to be a picture; otherwise as `fetch`."""
        return _data_uri(url, field, self.policy) if url[:5].lower() == "data:" else self._download(url, field)

    def _download(self, url: str, field: str) -> bytes:
        deadline = time.monotonic() + self.policy.timeout
        for _ in range(self.policy.max_redirects + 1):
            scheme, host, port, target = self._parse(url, field)
            try:
                found = self._request(scheme, host, port, target, field, deadline)
                if isinstance(found, bytes):
                    return found
                url = urljoin(url, found)
            except FetchError:
                raise
            except (OSError, http.client.HTTPException, ValueError):
                if time.monotonic() >= deadline:
                    raise FetchError(field, f"not answered within {self.policy.timeout:g} seconds") from None
                raise FetchError(field, "the picture could not be read from there") from None
        raise FetchError(field, f"more than {self.policy.max_redirects} redirects: give the final address")

    def _parse(self, url: str, field: str) -> tuple[str, str, int, str]:
        """Scheme, host, port, and path with query."""
        schemes = ("https", "http") if self.policy.allow_http else ("https",)
        expected = " or ".join(f"{scheme}://" for scheme in schemes) + " or data:image/...;base64,"
        if re.search(r"[\x00-\x20\x7f\\]", url):
            raise FetchError(field, "an address without blanks, backslashes and control characters is expected")
        try:
            parts = urlsplit(url)
            port, host = parts.port, parts.hostname
            name = parts.netloc and (host or "").encode("idna").decode("ascii")
        except ValueError:  # a UnicodeError is one
            raise FetchError(field, "not a well-formed address") from None
        if parts.scheme not in schemes:
            raise FetchError(field, f"expected an address that starts with {expected}")
        if not name or port == 0:
            raise FetchError(field, "not a well-formed address: it needs a host")
        if parts.username is not None or parts.password is not None:
            raise FetchError(field, "an address with a user or password is not taken")
        query = f"?{parts.query}" if parts.query else ""
        target = quote((parts.path or "/") + query, safe="/?&=%:;@!$'()*+,~[]-._")
        return parts.scheme, name, port or _PORTS[parts.scheme], target

    def _request(self, scheme: str, host: str, port: int, target: str, field: str, deadline: float) -> bytes | str:
        """What the server sent, or where it redirects to."""
        addresses = self._public_addresses(host, port, field, deadline)
        connection_type = http.client.HTTPSConnection if scheme == "https" else http.client.HTTPConnection
        options = {"context": self._ssl_context} if scheme == "https" else {}
        connection = connection_type(host, port, **options)
        opened = self._open(addresses, port, deadline)
        if scheme == "https":  # takes over the connection; shakes hands below, when the watchdog is awake
            opened = self._ssl_context.wrap_socket(opened, server_hostname=host, do_handshake_on_connect=False)
        connection.sock = opened
        # Time-outs of a socket start anew with every byte: a server could send one now and then for ever
        watchdog = threading.Timer(max(deadline - time.monotonic(), 0), _hang_up, [opened])
        watchdog.daemon = True
        watchdog.start()
        try:
            if isinstance(opened, ssl.SSLSocket):
                opened.do_handshake()
            connection.request("GET", target, headers=_HEADERS)
            response = connection.getresponse()
            if response.status in _REDIRECTS and response.headers.get("Location"):
                return response.headers["Location"]
            return self._body(response, field, deadline)
        finally:
            watchdog.cancel()
            connection.close()
            opened.close()

    def _body(self, response: http.client.HTTPResponse, field: str, deadline: float) -> bytes:
        if response.status != 200:
            raise FetchError(field, f"the server answered with status {response.status}, expected 200")
        if response.headers.get("Content-Encoding", "identity").lower() != "identity":
            raise FetchError(field, "the server compresses the picture although it was asked not to")
        if response.length is not None and response.length > self.policy.max_bytes:
            raise FetchError(field, _too_long(self.policy))
        body = bytearray()
        while chunk := response.read1(_CHUNK):
            body += chunk
            if len(body) > self.policy.max_bytes:
                raise FetchError(field, _too_long(self.policy))
            if time.monotonic() >= deadline:
                raise TimeoutError
        if time.monotonic() >= deadline:  # the watchdog's hanging up reads like an end
            raise TimeoutError
        return bytes(body)

    def _public_addresses(self, host: str, port: int, field: str, deadline: float) -> list[str]:
        """The addresses of a host, all of them public. One message for all else: it must not tell what exists here."""
        looking_up = self._resolving.submit(self._resolve, host, port)
        try:
            found = looking_up.result(timeout=max(deadline - time.monotonic(), 0))
            addresses = [address for address in found if address]
            if addresses and all(is_public_address(address) for address in addresses):
                return addresses
        except TimeoutError:
            looking_up.cancel()
            raise
        except (OSError, ValueError):
            pass
        raise FetchError(field, "the host is unknown or not on the public internet")

    def _open(self, addresses: Sequence[str], port: int, deadline: float) -> socket.socket:
        problem: OSError | None = None
        for address in addresses:
            remaining = deadline - time.monotonic()
            if remaining <= 0:
                break
            try:
                return self._connect(address, port, remaining)
            except OSError as error:
                problem = error
        raise problem or TimeoutError()


def _data_uri(url: str, field: str, policy: FetchPolicy) -> bytes:
    start = _DATA_URI.match(url[:200])
    if start is None:
        raise FetchError(field, "expected data:image/TYPE;base64, with the picture behind the comma")
    if (len(url) - start.end()) * 3 // 4 > policy.max_bytes + 2:
        raise FetchError(field, _too_long(policy))
    try:
        return base64.b64decode(url[start.end() :].encode("ascii"), validate=True)
    except (binascii.Error, UnicodeEncodeError):
        raise FetchError(field, "what follows the comma is not base64") from None


def _too_long(policy: FetchPolicy) -> str:
    return f"the picture has more than {policy.max_bytes} bytes: make it smaller"


def _system_addresses(host: str, port: int) -> list[str]:
    return [str(found[4][0]) for found in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)]


def _open_connection(address: str, port: int, timeout: float) -> socket.socket:
    return socket.create_connection((address, port), timeout=timeout)


def _hang_up(opened: socket.socket) -> None:
    try:
        opened.shutdown(socket.SHUT_RDWR)
    except OSError:
        pass
