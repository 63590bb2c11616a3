"""Find and remove what killed commands leave: temporary files and folders whose writer is dead.

Every name that this program writes aside ends in `.<process>-<machine>.partial` (`paths.partial_name`). The temporary
files of safetensors (`.tmp` and six letters) and of older versions (`<name>.partial`) name no process: they are removed
if they are older than this command and no process of this machine has them open. A folder that names no process stays
for an hour.
"""

import os
import re
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

from teachercache.core.paths import is_url, machine
from teachercache.core.process import is_alive

STALE = 3600.0  # seconds without a write after which a writer that cannot be asked is taken for dead
IMPORTED = time.time()  # stands for the start of this command where /proc is missing
CLOCK = 2.0  # seconds by which the start of a process may be off
_OURS = re.compile(r"\.(?P<process>\d+)-(?P<machine>[0-9a-f]{8})\.partial$")
_NAMELESS = re.compile(r"^\.tmp[A-Za-z0-9]{6}$|\.partial$")


def sweep(folder: Path) -> list[Path]:
    """Remove the leftovers of dead writers in a folder that this program owns, and below it.

    Args:
        folder: A cache, a run, an export or a report. At a URL nothing is left over.

    Returns:
        The files and folders that were removed. What cannot be removed stays, without an error.
    """
    if is_url(folder):
        return []
    found: list[Path] = []
    for where, folders, files in os.walk(folder):
        left = [name for name in (*folders, *files) if is_leftover_name(name)]
        folders[:] = [name for name in folders if name not in left]
        found += [Path(where, name) for name in left]
    return _remove(found)


def sweep_beside(path: Path) -> list[Path]:
    """Remove the leftovers of dead writers of one file or folder: those beside it whose names begin with its name."""
    if is_url(path):
        return []
    try:
        names = os.listdir(path.parent)
    except OSError:
        return []
    mine = [name for name in names if name.startswith(f"{path.name}.") and is_leftover_name(name)]
    return _remove([path.with_name(name) for name in mine])


def is_leftover_name(name: str) -> bool:
    """Return whether a name is that of a temporary file or folder, of a living or of a dead writer."""
    return bool(_NAMELESS.search(name))


def _remove(found: list[Path]) -> list[Path]:
    """Remove those whose writer is dead, and return them."""
    removed, opened = [], None
    for path in found:
        named = _OURS.search(path.name)
        try:
            last = _last_write(path)
            if named:
                dead = _is_dead(int(named["process"]), named["machine"], last)
            else:
                opened = _open_files() if opened is None else opened
                dead = _is_forgotten(path, last, opened)
            if not dead:
                continue
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink()
        except OSError:  # another command was faster, or the folder is not ours to change
            continue
        removed.append(path)
    return removed


def _is_dead(process: int, on: str, last: float) -> bool:
    """Return whether a writer is dead: it is no process of this machine, or one that began after the last write."""
    if on != machine():
        return time.time() - last > STALE
    if process == os.getpid():
        return False
    return not is_alive(process) or _start(process) > last + CLOCK


def _is_forgotten(path: Path, last: float, opened: set[tuple[int, int]]) -> bool:
    """Return whether nobody writes a file or folder that names no process."""
    if path.is_dir() and not path.is_symlink():
        return time.time() - last > STALE
    facts = path.lstat()
    return last < (_start(os.getpid()) or IMPORTED) + CLOCK and (facts.st_dev, facts.st_ino) not in opened


def _stats(path: Path) -> Iterator[os.stat_result]:
    """Yield the facts of a file, or of a folder and all files in it."""
    yield path.lstat()
    if path.is_dir() and not path.is_symlink():
        for entry in path.rglob("*"):
            yield entry.lstat()


def _last_write(path: Path) -> float:
    return max(facts.st_mtime for facts in _stats(path))


def _start(process: int) -> float:
    """Return when a process began, in seconds since 1970; 0 where that is not known."""
    try:
        boot = next(
            int(line.split()[1])
            for line in Path("/proc/stat").read_text().splitlines()
            if line.startswith("btime")
        )
        # The name of the program is in parentheses and may contain spaces; field 22 is the start
        ticks = int(Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[19])
        return boot + ticks / os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError, IndexError, StopIteration):
        return 0.0


def _open_files() -> set[tuple[int, int]]:
    """Return device and number of every file that a process of this machine has open, as far as it can be seen."""
    opened = set()
    for process in os.listdir("/proc") if os.path.isdir("/proc") else []:
        if not process.isdecimal():
            continue
        try:
            numbers = os.listdir(f"/proc/{process}/fd")
        except OSError:
            continue
        for number in numbers:
            try:
                facts = os.stat(f"/proc/{process}/fd/{number}")
            except OSError:
                continue
            opened.add((facts.st_dev, facts.st_ino))
    return opened
