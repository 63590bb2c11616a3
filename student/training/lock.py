"""Allow one trainer at a time in a run folder; the ranks of one launcher are one trainer."""

import contextlib
import fcntl
import json
import os
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from student.distributed import on_first_rank
from teachercache.core.errors import UserError
from teachercache.core.process import is_alive, rank

NAME = ".trainer.lock"
RENEWED, LASTS = 30.0, 300.0  # seconds, on file systems without locks
_held: set[int] = set()  # descriptors with a lock


def _close_held() -> None:
    """Close the locks in a forked data worker, which would otherwise hold them longer than its parent lives."""
    for descriptor in _held:
        os.close(descriptor)
    _held.clear()


os.register_at_fork(after_in_child=_close_held)


@contextlib.contextmanager
def only_trainer(folder: Path) -> Iterator[None]:
    """Create a run folder and hold its lock, on rank 0.

    The kernel releases the lock of a dead process. On a file system without locks, the time of the lock file is
    renewed instead.

    Raises:
        UserError: Another trainer works in the folder.
    """
    path, stopped = folder / NAME, threading.Event()
    taken: list[int] = []

    def take() -> None:
        folder.mkdir(parents=True, exist_ok=True)
        taken.append(_take(path))

    def renew() -> None:
        while not stopped.wait(RENEWED):
            with contextlib.suppress(OSError):
                os.utime(path)

    on_first_rank(take)
    keeper = threading.Thread(target=renew, daemon=True)
    try:
        if rank() == 0:
            keeper.start()
        yield
    finally:
        stopped.set()
        for descriptor in taken:
            keeper.join()
            with contextlib.suppress(OSError):
                path.unlink(missing_ok=True)  # before it is released: a file of the next trainer stays
            _held.discard(descriptor)
            os.close(descriptor)


def _take(path: Path) -> int:
    """Return a descriptor with the lock; raise UserError if another trainer has it."""
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = _holder(path)
            os.close(descriptor)
            raise _refusal(path.parent, holder) from None
        except OSError:  # a file system without locks
            holder = _holder(path)
            if _lives(path, holder):
                os.close(descriptor)
                raise _refusal(path.parent, holder) from None
        if _is_at(descriptor, path):
            break
        os.close(descriptor)  # the holder before removed the file meanwhile
    _held.add(descriptor)
    os.ftruncate(descriptor, 0)
    os.write(descriptor, json.dumps({"pid": os.getpid(), "host": socket.gethostname()}).encode())
    return descriptor


def _is_at(descriptor: int, path: Path) -> bool:
    """Return whether an open file still has this path."""
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def _holder(path: Path) -> tuple[int, str]:
    """Return process and host of the trainer that wrote the lock; (0, "") if they are not there yet."""
    try:
        record = json.loads(path.read_bytes())
        return int(record["pid"]), str(record["host"])
    except (OSError, ValueError, KeyError, TypeError):
        return 0, ""


def _lives(path: Path, holder: tuple[int, str]) -> bool:
    """Return whether the trainer that wrote a lock without the kernel's help still works."""
    process, host = holder
    if not host:
        return False
    return is_alive(process) if host == socket.gethostname() else time.time() - path.stat().st_mtime < LASTS


def _refusal(folder: Path, holder: tuple[int, str]) -> UserError:
    process, host = holder
    who = f"process {process} on {host}" if host else "another process"
    return UserError(f"{folder} is being trained by {who}: wait for it, or pass another --out")
