"""Read local folders and files: links are followed, circles are not, a pipe is never opened, and nothing is left out
without a word.
"""

import errno
import os
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

from teachercache.core.errors import MachineError, is_machine

Tell = Callable[[str, str], None]  # a reason in the plural, and the name of what it is about
Sizes = dict[str, int | None]  # the files of a folder and their bytes


def everything(name: str) -> bool:
    """Return True: every name is wanted."""
    return True


def no_word(reason: str, name: str) -> None:
    """Tell nothing."""


def walk_local(
    root: Path, keep: Callable[[str], bool] = everything, tell: Tell = no_word
) -> Iterator[tuple[str, Sizes]]:
    """Yield the folders below a root in sorted order, each before those inside of it, with its files.

    A linked folder is followed unless it leads to a folder above it, above the root too. Inside of a linked folder, a further link is
    followed only to a folder that was not met before, so that folders that refer to each other come to an end.

    Args:
        root: The folder.
        keep: Whether a folder of this name is entered.
        tell: Is called for each folder that is not entered, and for each broken link without an ending.

    Yields:
        The folder relative to the root ("" for the root), and its files with their bytes: 0 for a broken link, None
        for a pipe, a socket or a device.
    """
    met: set[tuple[int, int]] = set()
    # a stack of: the folder, the folders above it, whether a link leads to it
    waiting: list[tuple[str, tuple[tuple[int, int], ...], bool]] = [("", _identities_above(root), False)]
    while waiting:
        folder, above, linked = waiting.pop()
        try:
            here = os.stat(root / folder)
            entries = sorted(os.scandir(root / folder), key=lambda entry: entry.name)
        except OSError as error:
            if is_machine(error) or not folder:
                raise
            if isinstance(error, FileNotFoundError):
                raise MachineError(f"cannot read {root / folder}: it was listed a moment ago") from error
            tell(f"folders cannot be opened ({error.strerror})", folder)
            continue
        own = (here.st_dev, here.st_ino)
        met.add(own)
        files: Sizes = {}
        inside = []
        for entry in entries:
            path = os.path.join(folder, entry.name)
            found = _status(entry)
            if found is None and not os.path.splitext(entry.name)[1]:
                tell("links lead nowhere", path)
            elif found is None or not stat.S_ISDIR(found.st_mode):
                regular = found is None or stat.S_ISREG(found.st_mode)
                files[entry.name] = (found.st_size if found else 0) if regular else None
            elif not keep(entry.name):
                tell("folders are hidden or of an operating system", path)
            else:
                target, link = (found.st_dev, found.st_ino), entry.is_symlink()
                if target in (*above, own) or (link and linked and target in met):
                    tell("links lead back to a folder that is read already", path)
                else:
                    inside.append((path, (*above, own), linked or link))
        waiting.extend(reversed(inside))
        yield folder, files


def _identities_above(root: Path) -> tuple[tuple[int, int], ...]:
    """Return the device and number of each folder above a root."""
    found = [os.stat(folder) for folder in Path(os.path.realpath(root)).parents]
    return tuple((status.st_dev, status.st_ino) for status in found)


def _status(entry: os.DirEntry[str]) -> os.stat_result | None:
    """Return what a name leads to, or None for a broken link."""
    try:
        return entry.stat()
    except OSError as error:
        if is_machine(error):
            raise
        return None


def open_regular(path: Path) -> IO[bytes]:
    """Open a local file to read it. A pipe or a device is never waited for.

    Raises:
        OSError: It cannot be opened, or is no regular file.
    """
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise OSError(errno.EINVAL, "is no regular file", str(path))
    return open(path, "rb")


def read_regular(path: Path) -> bytes:
    """Return the bytes of a local file; see `open_regular`."""
    with open_regular(path) as file:
        return file.read()
