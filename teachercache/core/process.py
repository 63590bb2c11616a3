"""Facts about the current process: its rank, its signals, its memory, and the number of decoding processes beside it."""

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from types import FrameType

from teachercache.core.errors import UserError


def rank() -> int:
    """Return the rank of this process; 0 without a launcher."""
    return int(os.environ.get("RANK", "0"))


def local_rank() -> int:
    """Return the rank of this process on its machine."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def world_size() -> int:
    """Return the number of processes; 1 without a launcher."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def default_workers() -> int:
    """Return the number of decoding processes: the cores besides the computing process, at most 8."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(8, cores // max(1, world_size()) - 1))


def check_workers(number: int, option: str) -> None:
    """Raise a UserError if this machine cannot run that many decoding processes beside each other.

    Args:
        number: Decoding processes of this process.
        option: What the user typed in front of the number, for the message.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    most = max(16, 4 * cores)  # more only wait for each other, and each takes the memory of a process
    if number > most:
        raise UserError(f"{option}{number}: this machine has {cores} cores: choose at most {most}")


def is_alive(process: int) -> bool:
    """Return whether this machine has a process with that number."""
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


class Terminated(KeyboardInterrupt):
    """SIGTERM as an exception, so that temporary files are removed and decoding processes end, as on Ctrl-C."""


@contextlib.contextmanager
def terminable() -> Iterator[None]:
    """Raise Terminated on SIGTERM, instead of ending this process at once."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: FrameType | None) -> None:
        raise Terminated

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def keep_memory() -> None:
    """Make glibc keep freed activations for the next batch instead of returning them page by page.

    On the CPU every forward pass pays for page faults otherwise (LOG.md, "page faults").
    """
    import ctypes

    with contextlib.suppress(OSError, AttributeError):  # another C library
        libc = ctypes.CDLL(None)
        m_trim_threshold, m_mmap_max = -1, -4
        libc.mallopt(m_mmap_max, 0)
        libc.mallopt(m_trim_threshold, ctypes.c_int(-1))
