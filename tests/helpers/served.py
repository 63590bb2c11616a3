"""`tc serve` in a thread of the tests, and requests to it as no browser would send them."""

import contextlib
import dataclasses
import http.client
import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from teachercache.serve.opened import open_served
from teachercache.serve.server import listen, make_server, url_of


@dataclasses.dataclass(frozen=True)
class Site:
    """A running server."""

    port: int
    url: str
    caches: list

    def send(
        self, path: str, body: bytes | None = None, *, method: str = "", **headers: str
    ) -> tuple[int, dict[str, str], bytes]:
        """Status, headers and content of an answer. The path is sent as it is, with its dots."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=120)
        names = {name.replace("_", "-"): value for name, value in headers.items()}
        try:
            connection.request(method or ("GET" if body is None else "POST"), path, body, names)
            answer = connection.getresponse()
            return answer.status, {name.lower(): value for name, value in answer.getheaders()}, answer.read()
        finally:
            connection.close()

    def ask(self, path: str, values: object = None) -> dict:
        """The JSON of an answer."""
        body = None if values is None else json.dumps(values).encode()
        return json.loads(self.send(path, body)[2])

    def search(self, **values: object) -> list[dict]:
        """The answer of each cache to a query."""
        return self.ask("/api/search", values)["answers"]


@contextlib.contextmanager
def running(*caches: Path, host: str = "127.0.0.1") -> Iterator[Site]:
    """Serve caches on a free port until the block ends."""
    opened = [open_served(path) for path in caches]
    socket = listen(host, 0)
    server = make_server(opened, host)
    thread = threading.Thread(target=server.run, args=([socket],))
    thread.start()
    try:
        while not server.started:
            time.sleep(0.01)
        yield Site(socket.getsockname()[1], url_of(socket), opened)
    finally:
        server.should_exit = True
        thread.join()
        socket.close()
