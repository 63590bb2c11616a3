"""Refuse what does not come from the page itself: other hosts, other sites, large requests. Add security headers."""

import ipaddress
from collections.abc import Iterable, MutableMapping
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from teachercache.core.command import explained
from teachercache.core.progress import say

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

LOOPBACK = ("127.0.0.1", "localhost", "::1")
MOST_BYTES = 32 << 20  # of a request: a picture of 24 MB in base64
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src 'self' data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "Cache-Control": "no-store",  # the browser keeps no picture in its files
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Permissions-Policy": "camera=(), microphone=(), geolocation=()",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}


class Guard:
    """An ASGI layer around the application. Connections that are no HTTP requests (websockets) are refused.

    Args:
        app: The application.
        hosts: The names under which the server is reached.
        any_address: Also accept every numeric address, for a server on all interfaces. A page of another site can
            point its own name at this server (DNS rebinding), but no numeric address.
    """

    def __init__(self, app: "ASGIApp", hosts: Iterable[str], *, any_address: bool = False) -> None:
        self.app, self.hosts, self.any_address = app, frozenset(hosts), any_address

    async def __call__(self, scope: "Scope", receive: "Receive", send: "Send") -> None:
        """Handle one connection."""
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        if scope["type"] != "http":
            await send({"type": "websocket.close", "code": 1008})
            return
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        refused = self.refused(headers, scope["path"])
        if refused is not None:
            await _refuse(_with_headers(send), *refused)
            return
        try:
            await self.app(scope, receive, _with_headers(send))
        except Exception as error:  # the client has its status 500
            say(f"error: {explained(error)[1]}")

    def refused(self, headers: MutableMapping[str, str], path: str) -> tuple[int, str] | None:
        """Return the status and the reason why a request is refused, or None."""
        host = headers.get("host", "")
        if not self.is_ours(host):
            return 421, "this server answers under its own address only"
        origin = headers.get("origin")
        if origin is not None and urlsplit(origin).netloc != host:
            return 403, "requests from other sites are refused"
        if path != "/" and headers.get("sec-fetch-site", "none") not in ("none", "same-origin"):
            return 403, "requests from other sites are refused"
        length = headers.get("content-length", "0")
        if not length.isdecimal() or int(length) > MOST_BYTES:
            return 413, f"the request is larger than {MOST_BYTES >> 20} MB: search by a smaller picture"
        return None

    def is_ours(self, host: str) -> bool:
        """Return whether a Host header names this server."""
        try:
            name = urlsplit(f"//{host}").hostname or ""
        except ValueError:
            return False
        return name in self.hosts or (self.any_address and _is_address(name))


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def _with_headers(send: "Send") -> "Send":
    async def wrapped(message: "Message") -> None:
        if message["type"] == "http.response.start":
            added: list[tuple[bytes, bytes]] = [
                (name.lower().encode(), value.encode()) for name, value in HEADERS.items()
            ]
            message = {**message, "headers": [*message.get("headers", []), *added]}
        await send(message)

    return wrapped


async def _refuse(send: "Send", status: int, reason: str) -> None:
    start: dict[str, Any] = {"type": "http.response.start", "status": status}
    await send({**start, "headers": [(b"content-type", b"text/plain; charset=utf-8")]})
    await send({"type": "http.response.body", "body": reason.encode() + b"\n"})
