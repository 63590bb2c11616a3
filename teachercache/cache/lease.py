"""Allow one builder at a time for a cache at a URL: a lease, an object in the cache that its builder renews.

The ranks of one torchrun share a lease. Local caches use the kernel's locks instead, which a dead process
releases.
"""

import contextlib
import json
import os
import socket
import threading
import time
import zlib
from collections.abc import Iterator
from pathlib import Path

from teachercache.core.errors import UserError
from teachercache.core.paths import is_url, write_whole
from teachercache.core.process import is_alive, rank, world_size
from teachercache.core.urls import read_range

NAME = ".builder-"
RENEWED, LASTS = 30.0, 120.0  # seconds; the clocks of two builders must agree to about a minute


def is_lease(path: Path) -> bool:
    """Return whether a path is a lease."""
    return path.name.startswith(NAME)


@contextlib.contextmanager
def lease(cache: Path) -> Iterator[None]:
    """Hold the lease of a cache at a URL; raise UserError if another job holds it."""
    if not is_url(cache):
        yield
        return
    job, start, stopped = _job(), time.time(), threading.Event()
    own_lease = cache / f"{NAME}{zlib.crc32(job.encode()):08x}-{rank()}.json"
    owner = {"job": job, "host": socket.gethostname(), "pid": os.getpid(), "start": start}

    def renew() -> None:
        write_whole(own_lease, json.dumps({**owner, "time": time.time()}))

    def keep() -> None:
        while not stopped.wait(RENEWED):
            with contextlib.suppress(
                Exception
            ):  # the next renewal may succeed; otherwise the build itself fails
                renew()

    _refuse(cache, job, float("inf"))
    keeper = threading.Thread(target=keep, daemon=True)
    try:
        renew()
        _refuse(cache, job, start)  # of two jobs that started together the first one stays
        keeper.start()
        yield
    finally:
        stopped.set()
        if keeper.ident:
            keeper.join()
        with contextlib.suppress(Exception):
            own_lease.unlink(missing_ok=True)


def _job() -> str:
    """Return a name that all processes of one torchrun share, and no other process has."""
    address = [os.environ.get(name, "") for name in ("MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_RUN_ID")]
    one_machine = world_size() == 1 or address[0] in ("", "localhost", "127.0.0.1", "::1")
    return ":".join(
        [*address, socket.gethostname() if one_machine else "", str(os.getpid()) if world_size() == 1 else ""]
    )


def _refuse(cache: Path, job: str, start: float) -> None:
    """Raise UserError if a living builder of another job began before `start`; remove the leases of dead ones
    of this host.
    """
    for entry in list(cache.iterdir()) if cache.exists() else []:
        if not is_lease(entry):
            continue
        try:
            holder = json.loads(read_range(entry))  # one request: it may be renewed meanwhile
            age, host, process = time.time() - holder["time"], holder["host"], holder["pid"]
        except (FileNotFoundError, ValueError, KeyError, TypeError):
            continue
        if holder["job"] == job:
            continue
        if age > LASTS or (host == socket.gethostname() and not is_alive(process)):
            entry.unlink(missing_ok=True)
        elif holder["start"] < start:
            raise UserError(
                f"{cache} is being built by process {process} on {host}: wait for it; if it is dead, wait "
                f"{LASTS - age:.0f} seconds or remove {entry}"
            )
