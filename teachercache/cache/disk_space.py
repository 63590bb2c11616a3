"""Check that a cache fits on its disk before anything is written."""

import shutil

from teachercache.cache import store
from teachercache.cache.layout import chunk_bytes, expected_bytes
from teachercache.core.errors import UserError
from teachercache.core.paths import is_url
from teachercache.core.progress import say


def check_space(cache: store.Cache) -> None:
    """Print the final size of a cache; raise UserError if the disk is too small for the missing part."""
    total, written = expected_bytes(cache.meta), bytes_written(cache)
    say(f"{cache.path}: {size(total)} in total" + (f", {size(written)} of them written" if written else ""))
    if is_url(cache.path):
        return
    folder = next(path for path in (cache.path, *cache.path.absolute().parents) if path.exists())
    free, missing = shutil.disk_usage(folder).free, max(total - written, 0)
    if free < missing:
        raise UserError(
            f"{cache.path} needs {size(missing)} more and its disk has {size(free)} left: pass --out on another disk, "
            "or fewer --outputs, --views or rows (--limit)"
        )


def bytes_written(cache: store.Cache) -> int:
    """Return the bytes of the fields' values in the done records, as `expected_bytes` counts them.

    Keys, digests of pictures and the checksums of chunks are left out.
    """
    sizes = {name: chunk_bytes(cache, name) for name in cache.fields}
    records = filter(None, (store.done_record(cache, block) for block in store.listed_blocks(cache)))
    return sum(sizes.get(file.split("/")[0], 0) for record in records for file in record["files"])


def size(count: int) -> str:
    """Return a number of bytes with a unit."""
    power = min(max(len(str(count)) - 1, 0) // 3, 4)
    return f"{count / 1000**power:.3g} {('bytes', 'kB', 'MB', 'GB', 'TB')[power]}"
