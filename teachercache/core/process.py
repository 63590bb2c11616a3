"""Facts about this process: device, precision with its reason, ranks, and how it speaks to a person.

Not for anything that changes what is computed beyond the dtype named here.
"""

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from typing import Any


def rank() -> int:
    """Rank of this process, 0 without a launcher."""
    return int(os.environ.get("RANK", "0"))


def local_rank() -> int:
    """Rank on this machine."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def world_size() -> int:
    """Number of processes, 1 without a launcher."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def default_workers() -> int:
    """Decoding processes: what the machine has beside the one that computes."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(8, cores // max(1, world_size()) - 1))


def is_alive(process: int) -> bool:
    """Whether this machine has a process of that number."""
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


class Terminated(KeyboardInterrupt):
    """SIGTERM, taken like Ctrl-C: what is half done is put away, decoding processes end with their builder."""


@contextlib.contextmanager
def terminable() -> Iterator[None]:
    """Raise Terminated where SIGTERM would end this process without a word."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: Any) -> None:
        raise Terminated

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def keep_memory() -> None:
    """Have glibc keep freed activations for the next batch instead of returning them page by page.

    On the CPU every forward pays for page faults otherwise (LOG.md, "page faults").
    """
    import ctypes

    with contextlib.suppress(OSError, AttributeError):  # not glibc: nothing to set
        libc = ctypes.CDLL(None)
        m_trim_threshold, m_mmap_max = -1, -4
        libc.mallopt(m_mmap_max, 0)
        libc.mallopt(m_trim_threshold, ctypes.c_int(-1))
