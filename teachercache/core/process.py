"""Facts about the current process: its rank, its signals, its memory, its cores, and the number of decoding
processes beside it.
"""

import contextlib
import math
import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
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


def local_world_size() -> int:
    """Return the number of processes of this machine that work together; all of them without a launcher's word."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "") or world_size())


def cores() -> int:
    """Return the cores that this process and its neighbors may use: its affinity, within the quota of its cgroup."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, math.ceil(min(allowed, cpu_quota())))


def default_workers() -> int:
    """Return the number of decoding processes: the cores of this process's share besides its own, at most 8."""
    return max(1, min(8, cores() // max(1, local_world_size()) - 1))


def cpu_quota(groups: Path = Path("/proc/self/cgroup"), root: Path = Path("/sys/fs/cgroup")) -> float:
    """Return the smallest CPU quota of the cgroups of this process, in cores; inf if there is none.

    Args:
        groups: The file that lists the cgroups of the process, of version 1 or 2.
        root: Where cgroups are mounted.
    """
    try:
        lines = groups.read_text().splitlines()
    except OSError:
        return math.inf
    quotas = [math.inf]
    for line in lines:
        number, _, rest = line.partition(":")
        names, _, path = rest.partition(":")
        if number == "0" and not names:
            mounts, read = [root, root / "unified"], _quota_of_version_2
        elif "cpu" in names.split(","):
            mounts, read = [root / names, root / "cpu"], _quota_of_version_1
        else:
            continue
        folder = Path(
            path.lstrip("/")
        )  # in a container it may be that of the host: then the root alone is there
        quotas += [read(mount / part) for mount in mounts for part in (folder, *folder.parents)]
    return min(quotas)


def _quota_of_version_2(folder: Path) -> float:
    """Return the cores of `cpu.max`, which holds microseconds or `max`, and the period."""
    try:
        quota, period = (folder / "cpu.max").read_text().split()
        return math.inf if quota == "max" else int(quota) / int(period)
    except (OSError, ValueError, ZeroDivisionError):
        return math.inf


def _quota_of_version_1(folder: Path) -> float:
    """Return the cores of `cpu.cfs_quota_us`, which is -1 without a quota."""
    try:
        quota, period = (int((folder / f"cpu.cfs_{name}_us").read_text()) for name in ("quota", "period"))
        return quota / period if quota > 0 else math.inf
    except (OSError, ValueError, ZeroDivisionError):
        return math.inf


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
