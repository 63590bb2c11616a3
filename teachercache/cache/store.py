"""A cache on disk: create, open, write a block, read fields, join by key. Format version 2.

The files:

    <cache>/zarr.json                 the attributes, CacheMeta; rewritten last when a cache grows
    <cache>/<field>/c/<block>/...     one chunk file per block and copy (text or view): raw bytes, then their
                                      crc32c
    <cache>/done/<block>.json         rows, file checksums and unusable rows of the block; written last
    <cache>/pictures/...              of which bytes each row was computed, see `picture_bytes.py`
    <cache>/manifest.parquet          keys, texts, labels: makes a cache readable without the data
    <cache>/quarantine.jsonl          every unusable row with its reason, once all blocks are done
"""

import contextlib
import dataclasses
import errno
import json
import os
import shutil
import uuid
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import google_crc32c
import numpy as np

from teachercache.cache.layout import (
    Cache,
    build_command,
    chunk_bytes,
    chunk_path,
    chunk_shape,
    encode,
    is_record,
    metadata,
)
from teachercache.cache.lease import is_lease
from teachercache.cache.locks import LOCK, alone
from teachercache.cache.memory_map import can_map, map_chunks
from teachercache.cache.spec import FORMAT, CacheMeta, meta_from_dict
from teachercache.core.errors import UserError, closest, is_machine
from teachercache.core.leftovers import sweep_beside
from teachercache.core.paths import as_path, closest_path, flush_folder, is_url, partial_name, write_whole
from teachercache.data.manifest import Manifest, load_manifest, manifest_keys, write_manifest

if TYPE_CHECKING:
    import pyarrow as pa

Chunks = Mapping[tuple[str, int], np.ndarray]  # field and copy (text or view, otherwise 0) -> [rows, ...]
Problem = dict[str, Any]  # an entry of quarantine.jsonl: row, key, reason and, if it has one, text or view
Record = dict[str, Any]  # a done record


# ----------------------------------------------------------------------------------------------------
# Create and open


def is_there(path: Path) -> bool:
    """Return whether there is a cache at a path; raise UserError if there is something else."""
    if (path / "zarr.json").exists():
        return True
    if not path.exists():
        return False
    names = {entry.name for entry in path.iterdir() if not is_lease(entry)} if path.is_dir() else {path.name}
    half_created = is_url(path) and "manifest.parquet" in names  # by a builder that was killed
    if names and not half_created:
        raise UserError(f"{path} exists and is not a cache: pass another --out")
    return False


def create(path: Path, meta: CacheMeta, manifest: Manifest) -> Cache:
    """Create an empty cache. If another builder was first, return its cache, whatever it holds."""
    if is_url(path):  # without a rename the zarr.json of the group comes last
        write_manifest(manifest, path / "manifest.parquet")
        for name, content in metadata(meta).items():
            write_whole(path / name, content)
        return Cache(path, meta)
    partial = path.with_name(partial_name(path.name))
    shutil.rmtree(partial, ignore_errors=True)
    sweep_beside(path)
    try:
        try:
            (partial / "done").mkdir(parents=True)
        except OSError as error:
            if is_machine(error) and error.errno != errno.EROFS:
                raise
            raise UserError(f"cannot create {path}: {error.strerror}; pass another --out") from error
        for name, content in metadata(meta).items():
            write_whole(partial / name, content)
        write_manifest(manifest, partial / "manifest.parquet")
        (partial / LOCK).touch()
        os.rename(partial, path)
        flush_folder(path.absolute().parent)
    except BaseException as error:
        shutil.rmtree(partial, ignore_errors=True)
        first = isinstance(error, OSError) and error.errno in (errno.ENOTEMPTY, errno.EEXIST)
        if first:  # another builder was
            return open_cache(path)
        raise
    return Cache(path, meta)


def open_cache(where: str | Path) -> Cache:
    """Open the cache at a path or URL; raise UserError if there is none, or if its format is not supported."""
    path = as_path(where)
    try:
        attributes = json.loads((path / "zarr.json").read_text())["attributes"]
        if attributes["format"] != FORMAT:
            raise UserError(
                f"cache format {attributes['format']}, this version reads format {FORMAT}: remove the cache and run "
                f"`{build_command(attributes, path)}`"
            )
        meta = meta_from_dict(attributes)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    except FileNotFoundError as error:
        raise UserError(
            f"no cache at {path}: {closest_path(path)}make one with `tc build --teacher NAME --out {path}`"
        ) from error
    except (KeyError, TypeError, AttributeError, ValueError, RecursionError) as error:
        raise UserError(
            f"{path} is not a cache of this program, or its zarr.json is damaged ({repr(error)[:200]})"
        ) from error
    return Cache(path, meta)


def open_complete(path: str | Path) -> Cache:
    """Open a complete cache; raise UserError with the command that completes it."""
    cache = open_cache(path)
    missing = cache.meta.num_blocks - len(done_blocks(cache))
    if missing:
        raise UserError(
            f"{path} is not finished, {missing} of {cache.meta.num_blocks} blocks are missing: run `{cache.command()}`"
        )
    return cache


@contextlib.contextmanager
def _manifest_errors(cache: Cache) -> Iterator[None]:
    """Add the command that repairs the manifest to errors about it."""
    try:
        yield
    except FileNotFoundError as error:
        raise UserError(
            f"{cache.path} has no manifest.parquet: run `{cache.command()}` to mend it"
        ) from error
    except UserError as error:
        raise UserError(f"{error}: run `{cache.command()}` to mend it") from error


def cached_manifest(cache: Cache) -> Manifest:
    """Return the rows of a cache in its order, without rows that a killed builder had begun to add."""
    with _manifest_errors(cache):
        manifest = load_manifest(cache.path / "manifest.parquet")
    return dataclasses.replace(
        manifest, table=manifest.table.slice(0, cache.meta.rows), digest=cache.meta.manifest
    )


# ----------------------------------------------------------------------------------------------------
# Blocks


def record_path(cache: Cache, block: int) -> Path:
    """Return the done record of a block."""
    return cache.path / "done" / f"{block:08d}.json"


def listed_blocks(cache: Cache) -> list[int]:
    """Return the blocks that have a done record, whatever it covers."""
    names = [path.stem for path in (cache.path / "done").glob("*.json")]
    return sorted(int(name) for name in names if len(name) == 8 and name.isdecimal())


def done_blocks(cache: Cache) -> set[int]:
    """Return the finished blocks: those whose done record covers all rows, texts and views of the cache."""
    listed = [block for block in listed_blocks(cache) if block < cache.meta.num_blocks]
    return {block for block in listed if covers(cache, done_record(cache, block))}


def covers(cache: Cache, record: Record | None) -> bool:
    """Return whether a done record covers every row, text and view that its block has now, and is not to be retried."""
    if record is None or record.get("retry"):
        return False
    meta, last = cache.meta, cache.meta.block(record["block"]).stop
    return record["rows"][1] >= last and record["texts"] >= meta.texts and record["views"] >= meta.views


def _record_checksum(record: Record) -> int:
    return zlib.crc32(
        json.dumps({name: value for name, value in record.items() if name != "checksum"}).encode()
    )


def done_record(cache: Cache, block: int) -> Record | None:
    """Return the done record of a block, or None if it is missing or damaged: the block is then built again."""
    try:
        record = json.loads(record_path(cache, block).read_bytes())
        whole = record["checksum"] == _record_checksum(record) and is_record(record, block)
        return record if whole else None
    except (FileNotFoundError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None


def write_block(
    cache: Cache,
    block: int,
    chunks: Chunks,
    invalid: list[Problem],
    beside: Mapping[str, bytes] | None = None,
) -> None:
    """Write chunks of a block, then its done record, which also lists the unchanged chunks of an earlier
    record.

    Args:
        cache: The cache.
        block: The number of the block.
        chunks: The new chunks.
        invalid: The entries of its quarantine.
        beside: Files beside the arrays, by their relative names (`picture_bytes.py`).
    """
    beside = beside or {}
    rows, earlier = cache.meta.block(block), done_record(cache, block)
    files = dict(earlier["files"]) if earlier else {}
    contents = {
        chunk_path(cache, name, block, copy): encode(cache, name, values, len(rows))
        for (name, copy), values in sorted(chunks.items())
    }
    names = {path: path.relative_to(cache.path).as_posix() for path in contents}
    files |= {names[path]: [len(content), zlib.crc32(content)] for path, content in contents.items()}
    files |= {name: [len(content), zlib.crc32(content)] for name, content in beside.items()}
    needed = {
        chunk_path(cache, name, block, copy).relative_to(cache.path).as_posix()
        for name in (*cache.fields, "key")
        for copy in range(cache.copies(name))
    }
    arrays = {name for name in files if not name.startswith("pictures/")}
    if arrays != needed:
        raise ValueError(
            f"block {block} lacks {sorted(needed - arrays)} and has extra {sorted(arrays - needed)}"
        )
    # From here on a killed builder leaves an unfinished block, never a wrong one. A block that grows keeps its record
    # until the new one is written: its rows and texts have the same bytes in the new files.
    if covers(cache, earlier):
        forget_block(cache, block)
    for path, content in [*contents.items(), *((cache.path / name, beside[name]) for name in beside)]:
        write_whole(path, content)
    record = {
        "block": block,
        "rows": [rows.start, rows.stop],
        "texts": cache.meta.texts,
        "views": cache.meta.views,
        "files": dict(sorted(files.items())),
        "invalid": invalid,
    }
    write_record(cache, record)


def write_record(cache: Cache, record: Record) -> None:
    """Write a done record with its checksum, which comes last."""
    facts = {name: value for name, value in record.items() if name != "checksum"}
    content = json.dumps({**facts, "checksum": _record_checksum(facts)}, indent=1) + "\n"
    write_whole(record_path(cache, record["block"]), content)


def flush(path: Path) -> None:
    """Wait until the bytes of a file are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def finish(cache: Cache) -> list[Problem]:
    """Write quarantine.jsonl from the done records of a complete cache, and return its entries."""
    entries = quarantined(cache)
    with contextlib.suppress(FileNotFoundError):  # another builder finished first, with the same bytes
        write_whole(cache.path / "quarantine.jsonl", json_lines(entries), tag=f".{uuid.uuid4().hex}")
    return entries


def quarantined(cache: Cache) -> list[Problem]:
    """Return the entries about unusable rows and texts in the done records."""
    records = [done_record(cache, block) for block in range(cache.meta.num_blocks)]
    return [entry for record in records if record for entry in record["invalid"]]


def json_lines(entries: list[Problem]) -> str:
    """Return the content of quarantine.jsonl."""
    return "".join(json.dumps(entry) + "\n" for entry in entries)


def growing(cache: Cache) -> contextlib.AbstractContextManager[None]:
    """Let one process at a time rewrite the metadata of a cache."""
    return alone(cache.path)


def forget_block(cache: Cache, block: int) -> None:
    """Remove the done record of a block, so that the next build writes the block again."""
    record_path(cache, block).unlink(missing_ok=True)


# ----------------------------------------------------------------------------------------------------
# Reading


def read_field(cache: Cache, name: str) -> np.ndarray:
    """Return a whole field [rows, ...], [rows, texts, ...] or [rows, views, ...], memory-mapped if possible."""
    if name not in cache.fields:
        hint = closest(name, cache.fields)
        raise UserError(f"{cache.path} has no field '{name}': {hint}choose from {', '.join(cache.fields)}")
    meta, field, copies = cache.meta, cache.fields[name], cache.copies(name)
    chunk = chunk_shape(cache, name)
    files = [
        chunk_path(cache, name, block, copy) for copy in range(copies) for block in range(meta.num_blocks)
    ]
    if can_map(chunk_bytes(cache, name)) and not is_url(cache.path):
        array = map_chunks(files, chunk_shape=chunk, dtype=field.dtype)
    else:
        array = np.concatenate([_read_chunk(path, chunk, field.dtype) for path in files])
    shape = field.array_shape(meta.rows, meta.texts, meta.views)
    array = array.reshape(copies, meta.num_blocks * meta.block_rows, *field.shape)[:, : meta.rows]
    return array[0] if len(shape) == array.ndim - 1 else array.swapaxes(0, 1)


def read_rows(cache: Cache, name: str, copy: int, rows: np.ndarray) -> np.ndarray:
    """Return the values [n, *shape] of some rows and one text or view. Only their blocks are read, with
    checksums.
    """
    field, size = cache.fields[name], cache.meta.block_rows
    values = np.empty((len(rows), *field.shape), field.dtype)
    for block in np.unique(rows // size).tolist():
        in_block = rows // size == block
        path = chunk_path(cache, name, block, copy)
        chunk = _read_chunk(path, (size, *field.shape), field.dtype, check=True)
        values[in_block] = chunk[rows[in_block] - block * size]
    return values


def _read_chunk(path: Path, shape: Sequence[int], dtype: str, *, check: bool = False) -> np.ndarray:
    """Return a chunk file as an array; `check` verifies the checksum after the values."""
    count = int(np.prod(shape))
    content, size = path.read_bytes(), count * np.dtype(dtype).itemsize
    if len(content) < size:
        raise UserError(f"{path}: a chunk file is too short; run `tc verify`")
    if check and google_crc32c.value(content[:size]) != int.from_bytes(content[size:], "little"):
        raise UserError(f"{path}: a chunk file is damaged; run `tc verify`")
    return np.frombuffer(content, dtype, count).reshape(shape)


def read_keys(cache: Cache) -> np.ndarray:
    """Return all keys in row order."""
    return np.array(cached_manifest(cache).column("key"), dtype=np.dtypes.StringDType())


def join(cache: Cache, keys: "Sequence[str] | pa.Array | pa.ChunkedArray") -> np.ndarray:
    """Return the row of each key in the cache, -1 if there is none.

    Args:
        cache: The cache.
        keys: A list or an Arrow array of keys.
    """
    import pyarrow as pa
    import pyarrow.compute as pc

    wanted = keys if isinstance(keys, pa.Array | pa.ChunkedArray) else pa.array(keys, pa.string())
    rows = np.full(len(wanted), -1, np.int64)
    if len(wanted) and not _join_in_order(cache, wanted, rows):
        places = pc.index_in(wanted, value_set=cached_manifest(cache).table["key"].combine_chunks())
        rows[:] = places.fill_null(-1).to_numpy()
    return rows


def _join_in_order(cache: Cache, wanted: "pa.Array | pa.ChunkedArray", rows: np.ndarray) -> bool:
    """Fill `rows` if the keys are in the order of the cache, as they are unless the data changed; else return
    False.

    Keys are compared in chunks, without a table of all keys in memory.
    """
    import pyarrow.compute as pc

    done = start = 0
    with _manifest_errors(cache):
        for chunk in manifest_keys(cache.path / "manifest.parquet"):
            chunk = chunk[: cache.meta.rows - start]  # without rows that a killed builder had begun to add
            places = pc.index_in(wanted[done : done + len(chunk)], value_set=chunk).fill_null(-1).to_numpy()
            count = len(places) if (places >= 0).all() else int(np.argmax(places < 0))
            rows[done : done + count] = start + places[:count]
            done, start = done + count, start + len(chunk)
            if done == len(wanted):
                return True
    return False
