"""Files of a cache that follow from others: metadata, manifest.parquet, quarantine.jsonl. Are they what they must be?

What is damaged here is written again without the teacher. Not for blocks: see `store.damaged_blocks`.
"""

import dataclasses
import json
from typing import Any

import numpy as np
import zarr
from zarr.core.buffer import Buffer, cpu
from zarr.storage import MemoryStore

from teachercache.cache import store
from teachercache.cache.layout import metadata
from teachercache.core.errors import UserError
from teachercache.core.paths import write_whole
from teachercache.core.progress import say
from teachercache.data.manifest import Manifest, digest_rows, write_manifest


def damaged_files(cache: store.Cache) -> dict[str, str]:
    """Files that are missing or not what they must be, with the reason."""
    damaged = {name: "is not the metadata of this cache" for name in _wrong_metadata(cache)}
    try:
        manifest = store.cached_manifest(cache)
        if digest_rows(manifest.table) != cache.meta.manifest:
            damaged["manifest.parquet"] = "its rows are not those of zarr.json"
    except UserError as error:
        damaged["manifest.parquet"] = str(error).partition(": run `")[0]
    if len(store.done_blocks(cache)) == cache.meta.num_blocks:
        try:
            content = (cache.path / "quarantine.jsonl").read_bytes()
        except FileNotFoundError:
            content = b"?"
        if content != store.json_lines(store.quarantined(cache)).encode():
            damaged["quarantine.jsonl"] = "is not what the done records say"
    return damaged


def mend_files(cache: store.Cache, manifest: Manifest) -> None:
    """Write metadata that is wrong again, and a manifest that cannot be read, from the data as it is now."""
    with store.growing(cache):
        cache = store.open_cache(cache.path)  # another builder may just have made it grow
        for name in _wrong_metadata(cache):
            say(f"{cache.path / name} is damaged: it is written again")
            write_whole(cache.path / name, metadata(cache.meta)[name])
        try:
            store.cached_manifest(cache)
        except UserError:
            say(f"{cache.path / 'manifest.parquet'} is damaged: it is made again from {manifest.data}")
            write_manifest(_in_order_of_keys(cache, manifest), cache.path / "manifest.parquet")


def _wrong_metadata(cache: store.Cache) -> list[str]:
    """Every zarr.json that says something else than it must; that of the group, read just now, where parts do."""
    return [
        name
        for name, content in metadata(cache.meta).items()
        if _json(cache.path / name) != json.loads(content)
    ]


def _json(path: Any) -> Any:
    try:
        return json.loads(path.read_bytes())
    except (FileNotFoundError, ValueError):
        return None


def _in_order_of_keys(cache: store.Cache, manifest: Manifest) -> Manifest:
    """The rows of a cache by its own array of keys; blocks that are not written hold no order that mattered."""
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
        f"{cache.path / 'manifest.parquet'} is damaged and {manifest.data} has other rows now: pass another --out"
    )
