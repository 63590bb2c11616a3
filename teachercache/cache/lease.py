"""Allow one builder at a time for a cache at a URL: a lease, an object in the cache that its builder renews.

The ranks of one torchrun share a lease. Local caches use the kernel's locks instead, which a dead process
releases; on a file system that refuses locks the lease is a file beside the cache.
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

from teachercache.cache.locks import has_locks
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
    """Hold the lease of a cache without locks; raise UserError if another job holds it."""
    if has_locks(cache):
        yield
        return
    job, start, stopped = _job(), time.time(), threading.Event()
    folder, begin = _place(cache)
    own_lease = folder / f"{begin}{zlib.crc32(job.encode()):08x}-{rank()}.json"
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


def _place(cache: Path) -> tuple[Path, str]:
    """Return the folder of the leases of a cache, and how their names begin."""
    return (cache, NAME) if is_url(cache) else (cache.absolute().parent, f"{cache.name}{NAME}")


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
    folder, begin = _place(cache)
    for entry in list(folder.iterdir()) if folder.exists() else []:
        if not entry.name.startswith(begin) or not entry.name.endswith(".json"):
            continue
        try:
            # One request: it may be renewed meanwhile
            holder = json.loads(read_range(entry) if is_url(entry) else entry.read_bytes())
            age, host, process = time.time() - holder["time"], holder["host"], holder["pid"]
        except (FileNotFoundError, ValueError, KeyError, TypeError, RecursionError):
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
