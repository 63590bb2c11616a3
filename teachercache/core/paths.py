"""Local paths and URLs behind one interface, and atomic writes.

A path is a `pathlib.Path`, or a `UPath` of universal_pathlib for s3://, gs://, memory:// and the other file
systems of fsspec.
"""

import contextlib
import errno
import functools
import io
import os
import socket
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any, cast

from teachercache.core.errors import UserError


def is_url(path: object) -> bool:
    """Return whether a path or the text of a user names a place outside the local file system."""
    return "://" in str(path)


def local_path(text: str, option: str = "--out") -> Path:
    """Return the Path of a place that must be local; UserError for a URL, which would become a folder `s3:`."""
    if is_url(text):
        raise UserError(f"{option} {text} is a URL: write to a local folder, and copy it there afterwards")
    return Path(text)


def as_path(text: str | Path) -> Path:
    """Return a Path, or a UPath if the text is a URL. Listings of a URL are not cached."""
    if not is_url(text) or not isinstance(text, str):
        return Path(text) if isinstance(text, str) else text
    try:
        from upath import UPath

        path = UPath(text, use_listings_cache=False)
        assert path.fs is not None  # imports its driver, which may be missing
    except (ImportError, ValueError) as error:
        raise UserError(f"{text}: {error}; for s3:// run pip install 'teachercache[s3]'") from error
    return cast(Path, path)  # has the methods of a Path, and is declared as one throughout


def write_whole(path: Path, content: bytes | str, *, tag: str = "") -> None:
    """Write a file atomically: to a temporary file that is flushed and renamed, or in one PUT.

    Args:
        path: The file.
        content: Its content; text is encoded as UTF-8.
        tag: Makes the name of the temporary file unique if several processes may write the same file.
    """
    content = content.encode() if isinstance(content, str) else content
    stream_whole(path, lambda file: file.write(content), tag=tag)


def stream_whole(path: Path, write: Callable[[IO[bytes]], Any], *, tag: str = "") -> None:
    """Write a file as `write_whole` does, with a function that writes into an open file.

    Locally the content is never in memory as a whole. If the writing fails, the file is as it was before, and the
    temporary file is removed.

    Raises:
        OSError: The disk is full or fails, also where a library that writes raises an error of its own. It names the
            file.
    """
    if is_url(path):
        content = io.BytesIO()
        write(content)
        path.write_bytes(content.getvalue())
        return
    partial = path.with_name(partial_name(f"{path.name}{tag}"))
    partial.parent.mkdir(parents=True, exist_ok=True)
    raw = None
    try:
        raw = _Noting(partial, "wb")
        with io.BufferedWriter(raw, 1 << 20) as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
        flush_folder(path.parent)
    except BaseException as error:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
        failed = error if isinstance(error, OSError) else raw.failed if raw is not None else None
        if failed is not None and isinstance(error, Exception):  # write() and fsync() do not name the file
            raise OSError(failed.errno, failed.strerror or str(failed), str(path)) from error
        raise


class _Noting(io.FileIO):
    """A file that keeps the error of the system: libraries in C++ replace it by one without a number."""

    failed: OSError | None = None

    def write(self, content: Any, /) -> int:
        try:
            return super().write(content)
        except OSError as error:
            self.failed = error
            raise


def partial_name(name: str) -> str:
    """Return the temporary name of a file or folder: it ends in this process, its machine and `.partial`.

    `leftovers.py` reads it, to find out whether its writer lives.
    """
    return f"{name}.{os.getpid()}-{machine()}.partial"


@functools.cache
def machine() -> str:
    """Return eight hexadecimal digits of this machine's name and, in a container, of its numbers of processes."""
    try:
        numbers = os.readlink("/proc/self/ns/pid")
    except OSError:
        numbers = ""
    return f"{zlib.crc32(f'{socket.gethostname()} {numbers}'.encode()):08x}"


# What file systems that cannot flush a folder answer
_NO_FLUSH = {
    errno.EINVAL,
    errno.ENOTSUP,
    errno.EOPNOTSUPP,
    errno.ENOSYS,
    errno.EBADF,
    errno.EACCES,
    errno.EPERM,
}


def flush_folder(folder: Path) -> None:
    """Wait until the names of a folder are on the disk: a rename survives a power cut only then."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        if error.errno not in _NO_FLUSH:
            raise
