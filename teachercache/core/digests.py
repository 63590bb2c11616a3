"""Prove that the files of a folder hold the bytes that were written: digests.json has the SHA-256 of each.

The digest of a file enters digests.json before the file is renamed into place, and older digests of the name leave it
afterwards. At every instant a whole file has its digest there, so a kill between the two writes damages nothing.
Files without a digest, as older versions wrote them, are not checked. SHA-256 reads about 1.4 GB/s.
"""

import contextlib
import fcntl
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any

from teachercache.core.errors import UserError
from teachercache.core.paths import stream_whole, write_whole

NAME = "digests.json"
NOT_LOADED = ("README.md", "curve.png", "speed.json")  # no loader reads them: damage in them stops nothing


class _Hashing:
    """A file that hashes the bytes that pass it; the caller never seeks."""

    def __init__(self, file: IO[bytes]) -> None:
        self.file, self.hash = file, hashlib.sha256()

    def write(self, content: Any) -> int:
        self.hash.update(content)
        return self.file.write(content)


def stream_proved(path: Path, home: Path, write: Callable[[IO[bytes]], Any]) -> None:
    """Write a file as `stream_whole` does, and its digest into the digests.json of `home`.

    Args:
        path: The file, in `home` or below.
        home: The folder of digests.json.
        write: Writes into an open file from its start to its end.
    """
    name, digests = path.relative_to(home).as_posix(), []

    def write_and_note(file: IO[bytes]) -> None:
        hashing: Any = _Hashing(file)
        write(hashing)
        digests.append(hashing.hash.hexdigest())
        _change(home, lambda files: {**files, name: [*files.get(name, []), *digests]})

    stream_whole(path, write_and_note)
    _change(home, lambda files: {**files, name: digests})


def write_proved(path: Path, home: Path, content: bytes | str) -> None:
    """Write a file as `write_whole` does, and its digest into the digests.json of `home`."""
    content = content.encode() if isinstance(content, str) else content
    stream_proved(path, home, lambda file: file.write(content))


def remove_proved(path: Path, home: Path) -> None:
    """Remove a file, then its digest."""
    path.unlink(missing_ok=True)
    name = path.relative_to(home).as_posix()
    if name in read_digests(home)[0]:
        _change(home, lambda files: {other: digests for other, digests in files.items() if other != name})


def forget_missing(home: Path) -> None:
    """Drop the digests of files that are gone: a kill between the removal of a file and of its digest leaves them."""
    files, complete = read_digests(home)
    if not complete and not all((home / name).exists() for name in files):
        _change(home, lambda files: {name: value for name, value in files.items() if (home / name).exists()})


def seal(home: Path) -> None:
    """Write digests.json for every file below a folder that is complete: a missing file is damage from then on."""
    paths = sorted(path for path in home.rglob("*") if path.is_file() and path.name != NAME)
    files = {path.relative_to(home).as_posix(): [digest_of(path, flush=True)] for path in paths}
    write_whole(home / NAME, _rendered(files, complete=True))


def digest_of(path: Path, *, flush: bool = False) -> str:
    """Return the SHA-256 of a file in hexadecimal digits; `flush` also waits until its bytes are on the disk."""
    try:
        with open(path, "rb") as file:
            if flush:
                os.fsync(file.fileno())
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:  # read() does not name the file
        raise OSError(error.errno, error.strerror, str(path)) from error


def read_digests(home: Path) -> tuple[dict[str, list[str]], bool]:
    """Return the accepted digests of each file of a folder by name, and whether the folder was sealed.

    Raises:
        UserError: digests.json itself is damaged.
    """
    path = home / NAME
    try:
        content = path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        return {}, False
    with contextlib.suppress(ValueError, KeyError, TypeError, AttributeError):
        record = json.loads(content)
        files, complete = record["files"], record["complete"]
        if _rendered(files, complete=complete).encode() == content:
            return files, complete
    raise UserError(
        f"{path} is damaged: copy the folder again, or remove this file to go on without checks of the others"
    )


def is_sealed(home: Path) -> bool:
    """Return whether `seal` completed a folder; False for a folder whose digests.json is damaged."""
    try:
        return read_digests(home)[1]
    except UserError:
        return False


def damage_of(home: Path, name: str) -> str:
    """Return what is wrong with a file of a folder: "is missing", "is damaged" or ""."""
    files, complete = read_digests(home)
    if not (home / name).is_file():
        return "is missing" if complete and name in files else ""
    return "is damaged" if name in files and digest_of(home / name) not in files[name] else ""


def refuse_damage(home: Path, names: tuple[str, ...], remedy: str) -> None:
    """Raise a UserError that names the first of the files that is missing or holds other bytes than were written.

    Args:
        home: The folder.
        names: Names of files in it.
        remedy: What the user can do about it.
    """
    for name in names:
        if wrong := damage_of(home, name):
            raise UserError(f"{home / name} {wrong}: {remedy}")


def names_to_load(home: Path) -> tuple[str, ...]:
    """Return the names of the files with a digest that a loader of the folder may read, without subfolders."""
    files, _ = read_digests(home)
    return tuple(name for name in files if "/" not in name and name not in NOT_LOADED)


def _rendered(files: Mapping[str, list[str]], *, complete: bool) -> str:
    """Return the text of digests.json, which ends in a digest of itself."""
    record: dict[str, Any] = {"files": dict(sorted(files.items())), "complete": complete}
    own = hashlib.sha256(json.dumps(record).encode()).hexdigest()
    return json.dumps(record | {"digest": own}, indent=1) + "\n"


def _change(home: Path, change: Callable[[dict[str, list[str]]], dict[str, list[str]]]) -> None:
    """Read, change and write digests.json, one process at a time."""
    with _alone(home):
        files, complete = read_digests(home)
        write_whole(home / NAME, _rendered(change(files), complete=complete))


@contextlib.contextmanager
def _alone(home: Path) -> Iterator[None]:
    """Hold a lock on a folder, where its file system has locks."""
    descriptor = os.open(home, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
