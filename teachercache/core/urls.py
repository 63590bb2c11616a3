"""Read from URLs through fsspec: listings, byte ranges, many small files at once, and helpful error messages.

The functions accept local paths as well, so that readers treat both alike. `paths.py` writes.
"""

import concurrent.futures
import contextlib
import os
import posixpath
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, TYPE_CHECKING, TypeVar, cast

from teachercache.core.errors import UserError, is_machine
from teachercache.core.local import Sizes, Tell, everything, no_word, open_regular, walk_local
from teachercache.core.paths import as_path, is_url

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem
    from upath import UPath

# Headers of a tar file are read in blocks of this size, which skips larger images. Smaller images are read along: one
# request takes as long as the transfer of about a megabyte.
TAR_BLOCK = 256 << 10
TARS_AT_ONCE = 8  # each header waits for the previous one; several files in parallel hide that
SMALL_FILES_AT_ONCE = 256
PAUSES = (1.0, 4.0, 16.0)  # seconds before each retry of a read, on top of the driver's own retries
DRIVERS = (
    "aiobotocore",
    "botocore",
    "aiohttp",
    "gcsfs",
    "google",
    "azure",
    "adlfs",
    "fsspec",
    "huggingface_hub",
)

Item = TypeVar("Item")
Result = TypeVar("Result")


# ----------------------------------------------------------------------------------------------------
# Paths


def here(path: Path) -> Path:
    """Return the path with a driver of this process: fsspec's event loops and connections do not survive a
    fork.
    """
    return as_path(str(path)) if is_url(path) else path


def below(root: Path, name: str) -> Path:
    """Join a name to a root. A URL replaces the root; `..` goes up inside the bucket of a URL."""
    if is_url(name):
        return as_path(name)
    if not is_url(root) or not {"", ".", ".."} & set(name.split("/")):
        return root / name
    scheme, bucket, folder = _split(root)
    key = posixpath.normpath(posixpath.join("/", folder, name.lstrip("/"))).strip("/")
    return as_path(f"{scheme}://{bucket}/{key}")


def join_relative(folder: str, name: str) -> str:
    """Return a name of a folder relative to a manifest's root; a name that is a URL stays as it is."""
    if is_url(name):
        return name
    return f"{folder.rstrip('/')}/{name}" if is_url(folder) else os.path.normpath(os.path.join(folder, name))


def common_root(roots: list[Path]) -> Path:
    """Return the common parent of several roots. Local paths beside URLs, and URLs of two buckets, have the
    parent of the local ones.
    """
    local = [root for root in roots if not is_url(root)]
    splits = [_split(root) for root in roots if is_url(root)]
    if not local and len({split[:2] for split in splits}) == 1:
        scheme, bucket, _ = splits[0]
        return as_path(
            f"{scheme}://{bucket}/{posixpath.commonpath(['/' + folder for *_, folder in splits])[1:]}"
        )
    if any(root.is_absolute() for root in local):
        local = [root.absolute() for root in local]
    return Path(os.path.commonpath(local)) if local else Path()


def seen_from(root: Path, own: Path) -> str:
    """Return a root relative to a common root, or its URL if it lies elsewhere."""
    if not is_url(own):
        return os.path.relpath(own, root)
    *place, folder = _split(own)
    *common, above = _split(root)
    return posixpath.relpath("/" + folder, "/" + above) if place == common else str(own)


def tidy(data: str) -> str:
    """Normalize a path as it is recorded; os.path.normpath would turn s3:// into s3:/."""
    if not is_url(data):
        return os.path.normpath(data)
    return data if data.endswith("://") else data.rstrip("/")


def last_part(url: str) -> str:
    """Return the last name of a URL, or its bucket."""
    return url.split("://")[-1].rstrip("/").split("/")[-1]


def _split(url: Path | str) -> tuple[str, str, str]:
    """Return scheme, bucket and the rest of a URL; the scheme of a local path is empty."""
    scheme, _, rest = str(url).rpartition("://")
    bucket, _, folder = rest.partition("/")
    return scheme, bucket, folder.strip("/")


# ----------------------------------------------------------------------------------------------------
# Listings


def kind(path: Path) -> str:
    """Return `file`, `directory`, or an empty string if nothing exists at a URL."""
    try:
        return _fs(path).info(_key(path))["type"]
    except FileNotFoundError as error:
        if isinstance(error.__cause__, OSError) and not isinstance(error.__cause__, FileNotFoundError):
            raise error.__cause__ from error  # fsspec's http wraps a broken connection in it
        return ""


def glob_url(pattern: str) -> list[tuple[Path, bool]]:
    """Return the sorted paths that match a pattern, and whether each is a folder, with one listing."""
    path = as_path(pattern)
    found = _fs(path).glob(_key(path), detail=True)
    return [
        (as_path(_fs(path).unstrip_protocol(name)), found[name]["type"] == "directory")
        for name in sorted(found)
    ]


def children(folder: Path) -> list[tuple[Path, bool]]:
    """Return the sorted entries of a folder, and whether each is a folder, with one listing."""
    if not is_url(folder):
        return sorted((Path(entry.path), entry.is_dir()) for entry in os.scandir(folder))
    return [(folder / name, size is None) for name, size in sorted(_listing(folder).items())]


def _listing(folder: Path) -> dict[str, int | None]:
    """Return the names in a folder at a URL with their bytes, None for folders; {} if the folder does not
    exist.
    """
    _refuse_http(folder)
    try:
        found = _fs(folder).ls(_key(folder), detail=True)
    except (FileNotFoundError, NotADirectoryError):
        return {}
    own = _key(folder).strip("/")  # object stores may hold an empty object with the name of the folder
    sizes = {info["name"].strip("/"): None if info["type"] == "directory" else info["size"] for info in found}
    return {posixpath.basename(name): size for name, size in sizes.items() if name != own}


def walk(
    root: Path, keep: Callable[[str], bool] = everything, tell: Tell = no_word
) -> Iterator[tuple[str, Sizes]]:
    """Yield the folders below a root in sorted order, each with its files and their bytes; see `walk_local`."""
    if not is_url(root):
        yield from walk_local(root, keep, tell)
        return
    _refuse_http(root)
    start = len(_key(root).rstrip("/")) + 1
    folders: dict[tuple[str, ...], Sizes] = {}
    left_out = set()
    for name, info in _fs(root).find(_key(root), detail=True).items():
        *above, last = name[start:].split("/")
        no_data = next((i for i, part in enumerate(above) if not keep(part)), None)
        if no_data is not None:
            left_out.add("/".join(above[: no_data + 1]))
        elif last and info["type"] == "file":
            folders.setdefault(tuple(above), {})[last] = info["size"]
    for folder in sorted(left_out):
        tell("folders are hidden or of an operating system", folder)
    for parts in sorted(folders):
        yield "/".join(parts), folders[parts]


def is_http(path: Path | str) -> bool:
    """Return whether a path lies on a web server, which cannot list folders."""
    return str(path).startswith(("http://", "https://"))


def _refuse_http(path: Path) -> None:
    if is_http(path):
        raise UserError(
            f"{path}: folders cannot be listed over http: pass a .tar, .parquet, .csv, .json or .txt file"
        )


def file_size(path: Path) -> int:
    """Return the bytes of a file, 0 if it does not exist: the build then quarantines its row."""
    try:
        return _fs(path).info(_key(path))["size"] or 0 if is_url(path) else path.stat().st_size
    except FileNotFoundError:
        return 0
    except OSError as error:
        if is_url(path) or is_machine(error):
            raise
        return 0


def sizes_below(root: Path) -> Callable[[str], int | None]:
    """Return a function from a path below a root to its bytes, None if it does not exist.

    A folder at a URL is listed when its first file is looked up, a thousand files per request.
    """
    listings: dict[str, dict[str, int | None]] = {}

    def size(name: str) -> int | None:
        if not is_url(root) and not is_url(name):
            path = root / name
            return file_size(path) if path.exists() else None
        if is_http(root) or is_http(name):  # no listings: one request per file
            return file_size(below(root, name)) or None
        folder, _, last = name.rpartition("/")
        if folder not in listings:
            listings[folder] = _listing(below(root, folder))
        return listings[folder].get(last)

    return size


# ----------------------------------------------------------------------------------------------------
# Contents


def open_file(path: Path, block: int) -> IO[bytes]:
    """Open a binary file for random access; at a URL `block` bytes are read ahead."""
    if not is_url(path):
        return open_regular(path)
    file = _fs(path).open(_key(path), "rb", block_size=block, cache_type="readahead" if block else "none")
    if getattr(file, "size", 0) is None:
        raise UserError(
            f"the server of {path} does not support byte ranges: download the file and pass its path"
        )
    return file


def read_small(root: Path, files: list[tuple[str, int | None]]) -> Iterator[bytes]:
    """Yield the contents of small files below a root; at a URL many requests run at once.

    Args:
        root: The folder.
        files: Names and sizes in bytes.
    """
    if not is_url(root):
        yield from ((root / name).read_bytes() for name, _ in files)
        return
    for start in range(0, len(files), SMALL_FILES_AT_ONCE):
        part = files[start : start + SMALL_FILES_AT_ONCE]
        wanted = [(_key(below(root, name)), size) for name, size in part if size]
        paths, ends = [path for path, _ in wanted], [size for _, size in wanted]
        found = iter(_fs(root).cat_ranges(paths, [0] * len(paths), ends, on_error="raise") if paths else ())
        yield from (next(found) if size else b"" for _, size in part)


def in_order(function: Callable[[Item], Result], items: list[Item]) -> Iterator[Result]:
    """Map a function that waits for the network over items, with a few items ahead in threads."""
    if not items or not is_url(items[0]):
        yield from map(function, items)
        return
    pool = concurrent.futures.ThreadPoolExecutor(TARS_AT_ONCE)
    try:
        waiting = [pool.submit(function, item) for item in items[:TARS_AT_ONCE]]
        for i in range(len(items)):
            yield waiting.pop(0).result()
            if i + TARS_AT_ONCE < len(items):
                waiting.append(pool.submit(function, items[i + TARS_AT_ONCE]))
    finally:
        pool.shutdown(cancel_futures=True)


def read_range(path: Path, offset: int = 0, size: int | None = None) -> bytes:
    """Return bytes of a file at a URL with one request; raise FileNotFoundError if it does not exist."""
    end = None if size is None else offset + size
    if size == 0:
        return b""
    # with a start, even for a whole file: otherwise s3fs requests the size first
    content = persistently(lambda: _fs(path).cat_file(_key(path), start=offset, end=end), path)
    whole = size is not None and len(content) > size  # from a web server without byte ranges
    return content[offset:end] if whole else content


# ----------------------------------------------------------------------------------------------------
# Errors


def persistently(read: Callable[[], bytes], path: Path) -> bytes:
    """Return the result of a read, retried after a broken connection.

    A file that does not exist (FileNotFoundError) or is too short (b"") makes a row unusable. Other errors of
    the network stop the build with a UserError.
    """
    for pause in (*PAUSES, None):
        try:
            return read()
        except UserError:
            raise
        except Exception as error:
            code = _code(error)
            if code in ("InvalidRange", "416"):
                return b""
            if not _from_network(error):
                raise
            if isinstance(error, FileNotFoundError) and code != "NoSuchBucket":
                raise
            if pause is None or isinstance(error, PermissionError | FileNotFoundError):
                again = "run the same command to resume"
                raise UserError(f"cannot read {path}: {_reason(error)}; {_advice(path)}; {again}") from error
            time.sleep(pause)
    raise AssertionError("the last try returns or raises")


@contextlib.contextmanager
def explain_errors(path: Path | str, *, action: str = "read") -> Iterator[None]:
    """Turn a broken connection, missing rights and a missing bucket into a UserError that lists what to
    check.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        no_ranges = is_http(path) and isinstance(
            error, ValueError
        )  # fsspec's error for a server without byte ranges
        local = isinstance(error, OSError) and (
            not is_url(path) or isinstance(error.filename, str | os.PathLike)
        )
        if not (_from_network(error) or no_ranges) or local:
            raise
        raise UserError(f"cannot {action} {path}: {_reason(error)}; {_advice(path)}") from error


def _fs(path: Path) -> "AbstractFileSystem":
    """Return the file system of a UPath; paths that are not URLs never get here."""
    return cast("UPath", path).fs


def _key(path: Path) -> str:
    """Return the path of a UPath inside its file system."""
    return cast("UPath", path).path


def _from_network(error: Exception) -> bool:
    return isinstance(error, OSError) or type(error).__module__.split(".")[0] in DRIVERS


def _code(error: Exception) -> str:
    """Return the error code of the server: of S3, otherwise the HTTP status."""
    response = getattr(error.__cause__ or error, "response", None)
    if isinstance(response, dict):
        return str(response.get("Error", {}).get("Code", ""))
    return str(getattr(error, "status", "") or getattr(error, "code", ""))


def _reason(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _advice(path: Path | str) -> str:
    if str(path).startswith(("s3://", "s3a://")):
        return (
            "check the bucket's name, the credentials (AWS_PROFILE, AWS_ACCESS_KEY_ID) and AWS_ENDPOINT_URL"
        )
    return "check the address, the network and the credentials"
