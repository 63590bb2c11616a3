"""A cache on disk: create, open, write a block, read fields, join by key. Format version 1; not for computing.

<cache>/zarr.json                 attributes: CacheMeta
<cache>/<field>/c/<block>/...     one chunk file per block and field: raw little-endian bytes, then their crc32c
<cache>/done/<block>.json         the block's rows, file checksums and unusable rows; written last
<cache>/manifest.parquet          keys, texts, labels: a cache explains itself without the data
<cache>/quarantine.jsonl          every unusable row with its reason, once all blocks are done
"""

import contextlib
import dataclasses
import json
import os
import shlex
import shutil
import socket
import uuid
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from zarr.codecs import Crc32cCodec

from teachercache.mapped import can_map, map_chunks
from teachercache.names import UserError
from teachercache.paths import write_whole
from teachercache.samples import Manifest, write_manifest
from teachercache.spec import CacheMeta, Field, differences, meta_from_dict, to_dict

LOCK = ".lock"  # empty; a builder holds the byte of each block that it writes
MIN_BLOCK_ROWS, MAX_BLOCK_BYTES = 256, 64 << 20


@dataclasses.dataclass(frozen=True)
class Cache:
    """An opened cache."""

    path: Path
    meta: CacheMeta

    @property
    def fields(self) -> dict[str, Field]:
        """Every array but `key`: the teacher's fields and the two masks of usable rows and texts."""
        own = [Field("valid", (), "row", "bool", "whether the row can be used")]
        if self.meta.texts:
            own.append(Field("text_valid", (), "text", "bool", "whether the text can be used"))
        return {field.name: field for field in (*own, *self.meta.spec.fields)}

    def command(self, *, data: str | None = None) -> str:
        """The command that builds this cache, or one like it for all of `data`."""
        spec = self.meta.spec
        precision = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}[self.meta.precision]
        options = {"--teacher": spec.name, "--weights": spec.weights, "--data": self.meta.data, "--out": str(self.path),
                   "--precision": precision, "--limit": str(self.meta.rows)}  # fmt: skip
        if spec.weights == "pretrained":
            del options["--weights"]
        if data is not None:
            options["--data"] = data
            del options["--limit"]
        return shlex.join(["tc", "build", *(word for option in options.items() for word in option)])


def block_rows_for(fields: tuple[Field, ...], rows: int, texts: int) -> int:
    """Rows per block: a power of two, about 64 blocks, no chunk above 64 MiB."""
    widest = max(int(np.prod(f.array_shape(1, max(texts, 1)))) * np.dtype(f.dtype).itemsize for f in fields)
    size = MIN_BLOCK_ROWS
    while size < rows / 64 and 2 * size * widest <= MAX_BLOCK_BYTES:
        size *= 2
    while size > 1 and size * widest > MAX_BLOCK_BYTES:
        size //= 2
    return size


# ----------------------------------------------------------------------------------------------------
# Create and open


def create(path: Path, meta: CacheMeta, manifest: Manifest) -> Cache:
    """An empty cache, or the one that is there if it was made for the same teacher and data."""
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        if not (path / "zarr.json").exists():
            raise UserError(f"{path} is there and is no cache: pass another --out")
        cache = open_cache(path)
        changed = differences(cache.meta, meta, ignore=("data", "versions", "block_rows"))
        if changed:
            raise UserError(
                f"{path} holds another build ({'; '.join(changed)}): pass another --out, or remove that folder"
            )
        return cache
    partial = path.with_name(f"{path.name}.{socket.gethostname()}-{os.getpid()}.partial")
    partial.parent.mkdir(parents=True, exist_ok=True)
    _remove_abandoned(path)
    with zarr.config.set({"array.write_empty_chunks": True}):
        group = zarr.create_group(partial, zarr_format=3, attributes=to_dict(meta), overwrite=True)
        for field in Cache(partial, meta).fields.values():
            shape = field.array_shape(meta.rows, meta.texts)
            group.create_array(
                field.name,
                shape=shape,
                chunks=(meta.block_rows, *shape[1:]),
                dtype=field.dtype,
                compressors=[Crc32cCodec()],
                fill_value=False if field.dtype == "bool" else 0,
                dimension_names=field.dims(),
                attributes={"doc": field.doc},
            )
        group.create_array("key", shape=(meta.rows,), chunks=(meta.block_rows,), dtype=str,
                           dimension_names=("row",))  # fmt: skip
    write_manifest(manifest, partial / "manifest.parquet")
    (partial / "done").mkdir()
    (partial / LOCK).touch()
    try:
        os.rename(partial, path)
    except OSError:  # another builder was first
        shutil.rmtree(partial)
        return create(path, meta, manifest)
    return Cache(path, meta)


def _remove_abandoned(path: Path) -> None:
    """Remove the half-made folders of builders of this machine that were killed while they created this cache."""
    for folder in path.parent.glob(f"{path.name}.{socket.gethostname()}-*.partial"):
        try:
            os.kill(int(folder.name.split("-")[-1].removesuffix(".partial")), 0)
        except (ValueError, PermissionError):
            continue
        except ProcessLookupError:
            shutil.rmtree(folder, ignore_errors=True)


def open_cache(path: str | Path) -> Cache:
    """The cache at `path`; UserError where there is none or its format is not ours."""
    path = Path(path)
    try:
        attributes = json.loads((path / "zarr.json").read_text())["attributes"]
        meta = meta_from_dict(attributes)
    except FileNotFoundError as error:
        raise UserError(f"no cache at {path}: make one with `tc build --teacher NAME --out {path}`") from error
    except (KeyError, TypeError, json.JSONDecodeError) as error:
        raise UserError(f"{path} is not a cache of this program ({error!r})") from error
    return Cache(path, meta)


def open_complete(path: str | Path) -> Cache:
    """The cache at `path` with all blocks written; UserError ends in the command that finishes it."""
    cache = open_cache(path)
    missing = cache.meta.num_blocks - len(done_blocks(cache))
    if missing:
        raise UserError(
            f"{path} is not finished, {missing} of {cache.meta.num_blocks} blocks are missing: run `{cache.command()}`"
        )
    return cache


# ----------------------------------------------------------------------------------------------------
# Blocks


def _record_path(cache: Cache, block: int) -> Path:
    return cache.path / "done" / f"{block:08d}.json"


def done_blocks(cache: Cache) -> set[int]:
    """Blocks whose done record exists."""
    return {int(path.stem) for path in (cache.path / "done").glob("*.json")}


def _record_checksum(record: Mapping[str, Any]) -> int:
    return zlib.crc32(json.dumps({name: value for name, value in record.items() if name != "checksum"}).encode())


def done_record(cache: Cache, block: int) -> dict[str, Any]:
    """The done record of a block."""
    return json.loads(_record_path(cache, block).read_text())


def chunk_path(cache: Cache, name: str, block: int) -> Path:
    """The chunk file of a field's block."""
    dims = 1 if name == "key" else len(cache.fields[name].array_shape(1, 1))
    return cache.path.joinpath(name, "c", str(block), *["0"] * (dims - 1))


def write_block(cache: Cache, block: int, arrays: Mapping[str, np.ndarray], invalid: list[dict[str, Any]]) -> None:
    """Write all fields of a block, then its done record; what a killed builder left of it is removed first."""
    rows = cache.meta.block(block)
    expected = {*cache.fields, "key"}
    if set(arrays) != expected:
        raise ValueError(f"block needs {sorted(expected)}, got {sorted(arrays)}")
    files = {}
    lengths = {name: len(array) for name, array in arrays.items() if len(array) != len(rows)}
    if lengths:
        raise ValueError(f"block {block} has {len(rows)} rows, got {lengths}")
    with zarr.config.set({"array.write_empty_chunks": True}):
        for name in sorted(arrays):
            path = chunk_path(cache, name, block)
            for left in [*path.parent.glob(f"{path.name}.*.partial")]:
                left.unlink()
            zarr.open_array(cache.path / name, mode="r+")[rows.start : rows.stop] = arrays[name]
            content = path.read_bytes()
            files[str(path.relative_to(cache.path))] = [len(content), zlib.crc32(content)]
            flush(path)
    record = {"block": block, "rows": [rows.start, rows.stop], "files": files, "invalid": invalid}
    record["checksum"] = _record_checksum(record)
    write_whole(_record_path(cache, block), json.dumps(record, indent=1) + "\n")


def flush(path: Path) -> None:
    """Wait until a file's bytes are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def finish(cache: Cache) -> list[dict[str, Any]]:
    """Write quarantine.jsonl from the done records of a whole cache; its entries."""
    entries = [entry for block in range(cache.meta.num_blocks) for entry in done_record(cache, block)["invalid"]]
    with contextlib.suppress(FileNotFoundError):  # another builder finished first, with the same bytes
        text = "".join(json.dumps(entry) + "\n" for entry in entries)
        write_whole(cache.path / "quarantine.jsonl", text, tag=f".{uuid.uuid4().hex}")
    for left in cache.path.glob("quarantine.jsonl.*.partial"):  # of a builder that was killed here
        left.unlink(missing_ok=True)
    return entries


def damaged_blocks(cache: Cache) -> dict[int, str]:
    """Blocks with a file that is missing or not what was written, with the reason."""
    damaged = {}
    for block in sorted(done_blocks(cache)):
        try:
            record = done_record(cache, block)
            files = record["files"]
            if record["checksum"] != _record_checksum(record):
                raise ValueError("checksum")
        except (ValueError, KeyError, TypeError):
            damaged[block] = "its done record is damaged"
            continue
        for name, (size, checksum) in files.items():
            try:
                content = (cache.path / name).read_bytes()
            except OSError as error:
                damaged[block] = f"{name}: {error.strerror}"
                break
            if (len(content), zlib.crc32(content)) != (size, checksum):
                damaged[block] = f"{name}: checksum differs"
                break
    return damaged


def forget_block(cache: Cache, block: int) -> None:
    """Remove a block's done record, so that the next build writes the block again."""
    _record_path(cache, block).unlink(missing_ok=True)


# ----------------------------------------------------------------------------------------------------
# Reading


def read_field(cache: Cache, name: str) -> np.ndarray:
    """A whole field [rows, ...]: mapped from its chunk files where they can be, else read through zarr."""
    if name not in cache.fields:
        raise UserError(f"{cache.path} has no field '{name}': choose from {', '.join(cache.fields)}")
    field = cache.fields[name]
    shape = field.array_shape(cache.meta.rows, cache.meta.texts)
    chunk = (cache.meta.block_rows, *shape[1:])
    if can_map(int(np.prod(chunk)) * np.dtype(field.dtype).itemsize):
        files = [chunk_path(cache, name, block) for block in range(cache.meta.num_blocks)]
        return map_chunks(files, chunk_shape=chunk, rows=shape[0], dtype=field.dtype)
    return np.asarray(zarr.open_array(cache.path / name, mode="r")[:])


def read_keys(cache: Cache) -> np.ndarray:
    """All keys in row order."""
    return np.asarray(zarr.open_array(cache.path / "key", mode="r")[:])


def join(cache: Cache, keys: list[str]) -> np.ndarray:
    """The cache's row for each key, -1 where the cache lacks it: caches join by key, never by position."""
    import pyarrow as pa
    import pyarrow.compute as pc

    found = pc.index_in(pa.array(keys, pa.string()), value_set=pa.array(read_keys(cache).tolist(), pa.string()))
    return found.fill_null(-1).to_numpy(zero_copy_only=False).astype(np.int64)
