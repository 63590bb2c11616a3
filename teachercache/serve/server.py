"""Run the web server of `tc serve` until Ctrl-C or SIGTERM."""

import errno
import importlib
import socket
from collections.abc import Callable
from typing import Any

from teachercache.core.errors import UserError
from teachercache.core.process import terminable
from teachercache.serve.app import make_app
from teachercache.serve.guard import LOOPBACK
from teachercache.serve.opened import Served

EVERYWHERE = ("0.0.0.0", "::")
GRACE = 2  # seconds that running answers get at the end


def uvicorn_module() -> Any:
    """Import uvicorn; raise UserError with the pip command if the packages of the server are missing."""
    try:
        import uvicorn

        importlib.import_module("starlette")
    except ImportError as error:
        raise UserError(
            "the server needs Starlette and uvicorn: pip install 'teachercache[serve]'"
        ) from error
    return uvicorn


def listen(host: str, port: int) -> socket.socket:
    """Return a socket on a host and port (0: a free one); raise UserError if it cannot be had."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # With the protocol named, asyncio sets TCP_NODELAY on connections: an answer takes 40 ms less
    opened = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    opened.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        opened.bind((host, port))
        opened.listen(128)
    except OSError as error:
        opened.close()
        if error.errno == errno.EADDRINUSE:
            raise UserError(f"port {port} of {host} is in use: pass --port 0 for a free one") from error
        raise UserError(
            f"cannot listen on {host}, port {port} ({error.strerror}): pass another --host or --port"
        ) from error
    return opened


def url_of(opened: socket.socket) -> str:
    """Return the address of the page that a browser on this machine opens."""
    host, port = opened.getsockname()[:2]
    name = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(host, f"[{host}]" if ":" in host else host)
    return f"http://{name}:{port}/"


def make_server(caches: list[Served], host: str) -> Any:
    """Return the uvicorn server of some caches, which a socket from `listen` is passed to."""
    uvicorn = uvicorn_module()
    names = {*LOOPBACK, host, socket.gethostname().lower()} if host not in LOOPBACK else set(LOOPBACK)
    app = make_app(caches, hosts=names, any_address=host in EVERYWHERE)
    return uvicorn.Server(
        uvicorn.Config(
            app,
            log_config=None,
            log_level="critical",  # `Guard` prints errors in one line
            access_log=False,
            lifespan="off",
            ws="none",
            server_header=False,
            proxy_headers=False,
            timeout_graceful_shutdown=GRACE,
        )
    )


def serve(caches: list[Served], opened: socket.socket, host: str, *, ready: Callable[[], None]) -> None:
    """Answer requests until a signal ends it, which is raised as KeyboardInterrupt or Terminated.

    Args:
        caches: The opened caches.
        opened: The socket from `listen`.
        host: The value of `--host`.
        ready: Called when the socket takes connections.
    """
    server = make_server(caches, host)
    with terminable(), opened:
        try:
            ready()
            server.run(sockets=[opened])
        except KeyboardInterrupt as stopped:
            raise type(stopped)("stopped serving") from None
        raise KeyboardInterrupt("stopped serving")  # a shell that ignores SIGINT for its background jobs
