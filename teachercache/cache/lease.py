"""One builder at a time where there are no locks: an object in a cache at a URL, renewed while its builder lives.

Ranks of one torchrun share a cache. Not for local caches: there the kernel's locks free what a dead process held.
"""

import contextlib
import json
import os
import socket
import threading
import time
import zlib
from collections.abc import Iterator
from typing import Any

from teachercache.core.errors import UserError
from teachercache.core.paths import is_url, write_whole
from teachercache.core.process import is_alive, rank, world_size
from teachercache.core.urls import read_range

NAME, RENEWED, LASTS = (
    ".builder-",
    30.0,
    120.0,
)  # seconds; clocks of two builders must agree to about a minute


def is_lease(path: Any) -> bool:
    """Whether an object says who builds a cache."""
    return path.name.startswith(NAME)


@contextlib.contextmanager
def lease(cache: Any) -> Iterator[None]:
    """Hold a cache at a URL; UserError where another job does."""
    if not is_url(cache):
        yield
        return
    job, start, stopped = _job(), time.time(), threading.Event()
    mine = cache / f"{NAME}{zlib.crc32(job.encode()):08x}-{rank()}.json"
    facts = {"job": job, "host": socket.gethostname(), "pid": os.getpid(), "start": start}

    def renew() -> None:
        write_whole(mine, json.dumps({**facts, "time": time.time()}))

    def keep() -> None:
        while not stopped.wait(RENEWED):
            with contextlib.suppress(Exception):  # the next time, or the build itself meets what is wrong
                renew()

    _refuse(cache, job, float("inf"))
    keeper = threading.Thread(target=keep, daemon=True)
    try:
        renew()
        _refuse(cache, job, start)  # of two that started at once the first stays
        keeper.start()
        yield
    finally:
        stopped.set()
        if keeper.ident:
            keeper.join()
        with contextlib.suppress(Exception):
            mine.unlink(missing_ok=True)


def _job() -> str:
    """What the processes of one torchrun have in common and no others have."""
    where = [os.environ.get(name, "") for name in ("MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_RUN_ID")]
    alone = world_size() == 1 or where[0] in ("", "localhost", "127.0.0.1", "::1")
    return ":".join(
        [*where, socket.gethostname() if alone else "", str(os.getpid()) if world_size() == 1 else ""]
    )


def _refuse(cache: Any, job: str, start: float) -> None:
    """UserError where a living builder of another job began before `start`; what the dead of this host left goes."""
    for entry in list(cache.iterdir()) if cache.exists() else []:
        if not is_lease(entry):
            continue
        try:
            found = json.loads(read_range(entry))  # one request: it may be renewed meanwhile
            age, host, process = time.time() - found["time"], found["host"], found["pid"]
        except (FileNotFoundError, ValueError, KeyError, TypeError):
            continue
        if found["job"] == job:
            continue
        if age > LASTS or (host == socket.gethostname() and not is_alive(process)):
            entry.unlink(missing_ok=True)
        elif found["start"] < start:
            raise UserError(
                f"{cache} is being built by process {process} on {host}: wait for it; if it is dead, wait "
                f"{LASTS - age:.0f} seconds or remove {entry}"
            )
