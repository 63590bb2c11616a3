"""Check and repair the files of a cache that follow from others: metadata, manifest.parquet,
quarantine.jsonl.

They are written again without the teacher. Damaged blocks are found here, too; the next build writes them again.
"""

import dataclasses
import errno
import json
import os
import zlib
from pathlib import Path

import numpy as np
import zarr
from zarr.core.buffer import Buffer, cpu
from zarr.storage import MemoryStore

from teachercache.cache import store
from teachercache.cache.layout import metadata
from teachercache.cache.picture_bytes import damaged_times
from teachercache.core.errors import UserError, is_machine
from teachercache.core.paths import is_url, write_whole
from teachercache.core.progress import say, ticker
from teachercache.data.manifest import Manifest, digest_rows, is_as_written, write_manifest


def damaged_blocks(cache: store.Cache, *, suspects: bool = False) -> dict[int, str]:
    """Return the blocks with a file that is missing or damaged, with the reason.

    Args:
        cache: The cache.
        suspects: Read only files of finished blocks that are not older than the done record, which is written last.
            A file that is changed in place is found so, a bit that turns on the disk is not.
    """
    damaged, blocks = {}, list(store.listed_blocks(cache))
    with ticker(len(blocks), "blocks", "checking files") as tick:
        for block in blocks:
            reason = _damage_of_block(cache, block, suspects=suspects)
            if reason:
                damaged[block] = reason
            tick.step(1)
    return damaged


def _damage_of_block(cache: store.Cache, block: int, *, suspects: bool) -> str:
    """Return what is wrong with the first damaged file of a block, or ""."""
    record = store.done_record(cache, block)
    if record is None:
        return "its done record is damaged"
    if suspects and not store.covers(cache, record):
        return ""  # another builder may be writing it just now
    names = _suspects(cache, record) if suspects else list(record["files"])
    return next(filter(None, (_damage(cache, name, *record["files"][name]) for name in names)), "")


def _damage(cache: store.Cache, name: str, size: int, checksum: int) -> str:
    """Return what is wrong with a chunk file, or an empty string."""
    try:
        content = (cache.path / name).read_bytes()
    except FileNotFoundError:
        return f"{name}: {os.strerror(errno.ENOENT)}"
    except OSError as error:
        if is_url(cache.path) or (is_machine(error) and error.errno != errno.EIO):
            raise  # says nothing about the file
        return f"{name}: {error.strerror}"
    return "" if (len(content), zlib.crc32(content)) == (size, checksum) else f"{name}: checksum differs"


def _suspects(cache: store.Cache, record: store.Record) -> list[str]:
    """Return the chunk files of a block that are missing, of another size, or not older than its record."""
    found: list[str] = []
    try:
        written = store.record_path(cache, record["block"]).stat().st_mtime_ns
    except FileNotFoundError:  # another builder is about to write the block
        return found
    for name, (size, _) in record["files"].items():
        try:
            facts = (cache.path / name).stat()
        except FileNotFoundError:
            found.append(name)
            continue
        if facts.st_size != size or facts.st_mtime_ns >= written:
            found.append(name)
    return found


def forget_damaged(cache: store.Cache, *, every: bool = False) -> None:
    """Remove the done records of damaged blocks, so that this build writes them again.

    Args:
        cache: The cache.
        every: Read every file; otherwise see `damaged_blocks(suspects=True)`. At a URL nothing is read without it.
    """
    if is_url(cache.path) and not every:
        return
    for block, reason in damaged_blocks(cache, suspects=not every).items():
        say(f"{cache.path}: block {block} is damaged ({reason}): writing it again")
        store.forget_block(cache, block)


def damaged_files(cache: store.Cache) -> dict[str, str]:
    """Return the files that are missing or wrong, with the reason."""
    damaged = {name: "is not the metadata of this cache" for name in _wrong_metadata(cache)}
    damaged |= dict.fromkeys(damaged_times(cache), "checksum differs")
    try:
        manifest = store.cached_manifest(cache)
        if digest_rows(manifest.table) != cache.meta.manifest:
            damaged["manifest.parquet"] = "its rows are not those of zarr.json"
        elif not is_as_written(cache.path / "manifest.parquet"):
            damaged["manifest.parquet"] = "its bytes are not those that were written"
    except UserError as error:
        damaged["manifest.parquet"] = str(error).partition(": run `")[0]
    if len(store.done_blocks(cache)) == cache.meta.num_blocks:
        try:
            content = (cache.path / "quarantine.jsonl").read_bytes()
        except FileNotFoundError:
            content = b"?"
        if content != store.json_lines(store.quarantined(cache)).encode():
            damaged["quarantine.jsonl"] = "does not match the done records"
    return damaged


def mend_files(cache: store.Cache, manifest: Manifest) -> None:
    """Rewrite wrong metadata, and a manifest that cannot be read from the present data."""
    with store.growing(cache):
        cache = store.open_cache(cache.path)  # another builder may just have extended it
        for name in _wrong_metadata(cache):
            say(f"{cache.path / name} is damaged: writing it again")
            write_whole(cache.path / name, metadata(cache.meta)[name])
        for name in damaged_times(cache):
            say(f"{cache.path / name} is damaged: making it again")
            (cache.path / name).unlink()
        path = cache.path / "manifest.parquet"
        try:
            stored = store.cached_manifest(cache)
            if is_url(path) or is_as_written(path):
                return
        except UserError:
            stored = None
        say(f"{path} is damaged: making it again from {manifest.data}")
        try:
            write_manifest(_in_order_of_keys(cache, manifest), path)
        except UserError:
            if stored is None or digest_rows(stored.table) != cache.meta.manifest:
                raise
            write_manifest(stored, path)  # the data changed, but the rows can be read


def _wrong_metadata(cache: store.Cache) -> list[str]:
    """Return every zarr.json with a wrong content."""
    return [
        name
        for name, content in metadata(cache.meta).items()
        if _json(cache.path / name) != json.loads(content)
    ]


def _json(path: Path) -> object:
    try:
        return json.loads(path.read_bytes())
    except (FileNotFoundError, ValueError, RecursionError):
        return None


def _in_order_of_keys(cache: store.Cache, manifest: Manifest) -> Manifest:
    """Return the rows in the order of the cache's array of keys; rows of unwritten blocks have no order."""
    place = {key: row for row, key in enumerate(manifest.column("key"))}
    names = ["key/zarr.json", *(f"key/c/{block}" for block in store.done_blocks(cache))]
    files: dict[str, Buffer] = {
        name: cpu.Buffer.from_bytes((cache.path / name).read_bytes()) for name in names
    }
    keys = np.asarray(zarr.open_array(MemoryStore(files), path="key", mode="r")[:]).tolist()
    order = [place.pop(key, -1) for key in keys]
    rest = iter(place.values())
    order = [next(rest, -1) if row < 0 else row for row in order]
    if -1 not in order:
        table = manifest.table if order == list(range(len(manifest))) else manifest.table.take(order)
        if digest_rows(table) == cache.meta.manifest:
            return dataclasses.replace(manifest, table=table, digest=cache.meta.manifest)
    raise UserError(
        f"{cache.path / 'manifest.parquet'} is damaged and {manifest.data} has different rows: pass another --out"
    )
