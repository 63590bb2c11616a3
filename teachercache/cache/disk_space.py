"""Whether a cache fits on its disk, asked before anything is written. Not for what a cache holds: see `layout.py`."""

import shutil

from teachercache.cache import store
from teachercache.cache.layout import expected_bytes
from teachercache.core.errors import UserError
from teachercache.core.paths import is_url
from teachercache.core.progress import say


def ask_space(cache: store.Cache) -> None:
    """Say how large a cache becomes; UserError where the disk has less room than what is still missing."""
    whole, there = expected_bytes(cache.meta), store.bytes_there(cache)
    say(f"{cache.path}: {size(whole)} when it is whole" + (f", {size(there)} of them there" if there else ""))
    if is_url(cache.path):
        return
    place = next(path for path in (cache.path, *cache.path.absolute().parents) if path.exists())
    free, missing = shutil.disk_usage(place).free, max(whole - there, 0)
    if free < missing:
        raise UserError(
            f"{cache.path} needs {size(missing)} more and its disk has {size(free)}: pass --out on another disk, "
            "or fewer --outputs, --views or rows (--limit)"
        )


def size(count: int) -> str:
    """Bytes in words."""
    power = min(max(len(str(count)) - 1, 0) // 3, 4)
    return f"{count / 1000**power:.3g} {('bytes', 'kB', 'MB', 'GB', 'TB')[power]}"
