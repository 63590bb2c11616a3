"""Lock bytes of a file in a local cache, so that builders share its blocks and one at a time changes its metadata.

The kernel releases the locks of a dead process. Some file systems refuse such locks; builders take a lease there, as
at URLs (`lease.py`).
"""

import contextlib
import errno
import fcntl
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

from teachercache.core.paths import is_url

LOCK = ".lock"  # an empty file; a builder locks the byte of each block that it writes
GROW_BYTE = 1 << 40  # locked while the metadata of a cache is rewritten
PROBE_BYTE = GROW_BYTE + 1
HELD = {errno.EAGAIN, errno.EACCES}
REFUSED = {errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS}


def open_lock(cache: Path) -> int:
    """Return a descriptor of the lock file, which a copied cache may lack."""
    return os.open(cache / LOCK, os.O_RDWR | os.O_CREAT, 0o666)


def try_lock(descriptor: int, byte: int) -> bool:
    """Lock a byte and return True; return False if another process holds it.

    Raises:
        OSError: The file system has no such locks, or fails.
    """
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, byte)
    except OSError as error:
        if error.errno in HELD:
            return False
        raise
    return True


def has_locks(cache: Path) -> bool:
    """Return whether builders can lock bytes at the place of a cache, which need not exist."""
    if is_url(cache):
        return False
    folder = next(path for path in (cache.absolute(), *cache.absolute().parents) if path.is_dir())
    try:
        with (
            open(cache / LOCK, "r+b")
            if (cache / LOCK).exists()
            else tempfile.TemporaryFile(dir=folder) as file
        ):
            try_lock(file.fileno(), PROBE_BYTE)
    except OSError as error:  # that nothing can be written here is reported by what is going to write
        return error.errno not in REFUSED
    return True


@contextlib.contextmanager
def alone(cache: Path) -> Iterator[None]:
    """Let one process at a time change the metadata of a cache, where there are locks; elsewhere a lease does that."""
    if is_url(cache):
        yield
        return
    descriptor = open_lock(cache)
    try:
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX, 1, GROW_BYTE)
        except OSError as error:
            if error.errno not in REFUSED:
                raise
        yield
    finally:
        os.close(descriptor)
