"""Names that a server on this machine answers to.

A page from elsewhere can let its own name point to 127.0.0.1 and then read what a server there says (DNS rebinding).
The browser still sends that name in the header Host, which is how such a request is known.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Callable, Sequence

from starlette.datastructures import Headers
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from piip_core.errors import ConfigError

__all__ = ["HostCheck", "allowed_names", "is_loopback"]

# A name, IPv4 address or bracketed IPv6 address, and maybe a port
_HOST = re.compile(r"(?:\[(?P<address>[0-9A-Fa-f:.]+)\]|(?P<name>[A-Za-z0-9._-]+))(?::[0-9]*)?")


class HostCheck:
    """Lets requests through whose header Host is one of some names, or a loopback name or address; others never reach
    the application. Ports do not matter.

    Args:
        app: The application (ASGI).
        names: What is allowed, as `allowed_names` makes it.
        refuse: Makes the answer to other requests of a status and a message: 400 without one well-formed header, 421
            for another host.
    """

    def __init__(self, app: ASGIApp, names: Sequence[str], refuse: Callable[[int, str], Response]) -> None:
        self._app, self._names, self._refuse = app, frozenset(names), refuse

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers, or passes on."""
        app = self._app
        if scope["type"] in ("http", "websocket"):
            given = Headers(scope=scope).getlist("host")
            name = _name(given[0]) if len(given) == 1 else None
            if name is None:
                app = self._refuse(400, "expected one header Host with a name or an address")
            elif name not in self._names and not is_loopback(name):
                app = self._refuse(
                    421, f"this server does not answer to the host {name}, see its option --allowed-host"
                )
        await app(scope, receive, send)


def is_loopback(host: str) -> bool:
    """Whether a name or an address, of IPv6 without brackets, means this machine alone."""
    if host.lower() == "localhost":
        return True
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return False
    return (getattr(address, "ipv4_mapped", None) or address).is_loopback


def allowed_names(hosts: Sequence[str]) -> tuple[str, ...]:
    """Names and addresses in the form that `HostCheck` compares.

    Raises:
        ConfigError: For what is no name and no address, or has a port.
    """
    found = []
    for host in hosts:
        bare = host.strip("[]")
        name = _name(f"[{bare}]" if ":" in bare else bare)
        if name is None:
            raise ConfigError(f"--allowed-host {host}: expected a name or an address, without a port")
        found.append(name)
    return tuple(found)


def _name(header: str) -> str | None:
    """Name or address of a header Host, in one spelling; None if it is malformed."""
    match = _HOST.fullmatch(header.strip())
    if match is None:
        return None
    if match["address"] is None:
        return match["name"].lower().removesuffix(".") or None
    try:
        return str(ipaddress.IPv6Address(match["address"]))
    except ValueError:
        return None
