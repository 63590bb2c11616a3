"""Paths and URLs alike: a local Path, or universal_pathlib's UPath for s3://, gs://, memory:// and the rest of fsspec.

Writes are whole or not there. Not for reading pictures: see `samples.py`.
"""

import io
import os
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

from teachercache.core.errors import UserError


def is_url(path: Any) -> bool:
    """Whether a path, or what a user typed, names a place that is not a local file."""
    return "://" in str(path)


def as_path(text: Any) -> Any:
    """A Path, or a UPath with the same methods where the text is a URL; listings of a URL are never remembered."""
    if not is_url(text) or not isinstance(text, str):
        return Path(text) if isinstance(text, str) else text
    try:
        from upath import UPath

        path = UPath(text, use_listings_cache=False)
        assert path.fs is not None  # its driver is imported now, so that its absence is told here
    except (ImportError, ValueError) as error:
        raise UserError(f"{text}: {error}; for s3:// run pip install 'teachercache[s3]'") from error
    return path


def write_whole(path: Path, content: bytes | str, *, tag: str = "") -> None:
    """Write a file so that it is whole or not there: aside, flushed and renamed, or in one PUT.

    A `tag` where several processes may write the same local file at once.
    """
    content = content.encode() if isinstance(content, str) else content
    stream_whole(path, lambda file: file.write(content), tag=tag)


def stream_whole(path: Path, write: Callable[[IO[bytes]], Any], *, tag: str = "") -> None:
    """As `write_whole`, by a function that writes into an open file: locally nothing is whole in memory."""
    if is_url(path):
        content = io.BytesIO()
        write(content)
        path.write_bytes(content.getvalue())
        return
    partial = path.with_name(f"{path.name}{tag}.partial")
    partial.parent.mkdir(parents=True, exist_ok=True)
    try:
        with open(partial, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:  # write() and fsync() do not say which file it was
        raise OSError(error.errno, error.strerror, str(path)) from error
    os.replace(partial, path)
