"""The layout of a cache: shapes, chunk files, their encoding and the metadata. Reads and writes no file.

A chunk holds one block of rows of one field, of one text or one view if a row has several, so that texts and
views can be added without rewriting existing chunks.
"""

import dataclasses
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from zarr.codecs import Crc32cCodec
from zarr.core.buffer import Buffer
from zarr.storage import MemoryStore

from teachercache.cache.spec import CacheMeta, Field, checksum, to_dict
from teachercache.data.views import PARAMS, Augment

MIN_BLOCK_ROWS, MAX_BLOCK_BYTES = 256, 64 << 20


@dataclasses.dataclass(frozen=True)
class Cache:
    """An opened cache."""

    path: Path
    meta: CacheMeta

    @property
    def fields(self) -> dict[str, Field]:
        """Every array but `key`: the fields of the teacher, the masks of usable rows and texts, the
        parameters of views.
        """
        masks = [Field("valid", (), "row", "bool", "whether the row can be used")]
        if self.meta.texts:
            masks.append(Field("text_valid", (), "text", "bool", "whether the text can be used"))
        if self.meta.views:
            masks.append(Field("view_params", (len(PARAMS),), "image", "float32", ", ".join(PARAMS)))
        return {field.name: field for field in (*masks, *self.meta.spec.fields)}

    def copies(self, name: str) -> int:
        """Return the number of chunk files of a block of a field: its texts, its views, or 1."""
        return 1 if name == "key" else self.fields[name].copies(self.meta.texts, self.meta.views) or 1

    def command(self, *, data: str | None = None) -> str:
        """Return the command that builds this cache, or one like it for all rows of `data`."""
        return build_command(to_dict(self.meta), self.path, data=data)


def build_command(attributes: Mapping[str, Any], path: Path, *, data: str | None = None) -> str:
    """Return the `tc build` command for the attributes of a cache, also of an older format.

    Args:
        attributes: The attributes of the Zarr group.
        path: Where the command writes the cache.
        data: Other data to build the cache of, without a limit of rows.
    """
    spec = attributes["spec"]
    options = {
        "--teacher": printed_teacher(spec["name"]),
        "--outputs": ",".join(spec["outputs"]),
        "--weights": spec["weights"],
        "--data": data or attributes["data"],
        "--out": str(path),
        "--precision": {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}[attributes["precision"]],
        "--views": attributes.get("views", 0),
        "--limit": 0 if data else attributes.get("limit", 0),
    }
    defaults = {"--outputs": "embeddings", "--weights": "pretrained", "--views": 0, "--limit": 0}
    words = [
        str(word) for option in options.items() if defaults.get(option[0]) != option[1] for word in option
    ]
    augment = dataclasses.asdict(Augment())
    changed = [
        f"{name}={value:g}"
        for name, value in attributes.get("augment", {}).items()
        if value != augment.get(name)
    ]
    return shlex.join(
        ["tc", "build", *words, *(word for setting in changed for word in ("--augment", setting))]
    )


def printed_teacher(name: str) -> str:
    """Return the stored name of a teacher as printed commands have it.

    A name of the form package.module:ENTRY becomes a placeholder: a person who copies a printed command would import
    the module, and whoever wrote the cache chose its name.
    """
    module, colon, attribute = name.partition(":")
    imported = colon and attribute.isidentifier() and all(word.isidentifier() for word in module.split("."))
    return "PACKAGE.MODULE:ENTRY" if imported else name


def block_rows_for(fields: tuple[Field, ...], rows: int) -> int:
    """Return the number of rows per block: a power of two for about 64 blocks, with chunks of at most 64 MiB."""
    largest = max(int(np.prod(f.shape, dtype=int)) * np.dtype(f.dtype).itemsize for f in fields)
    size = MIN_BLOCK_ROWS
    while size < rows / 64 and 2 * size * largest <= MAX_BLOCK_BYTES:
        size *= 2
    while size > 1 and size * largest > MAX_BLOCK_BYTES:
        size //= 2
    return size


def expected_bytes(meta: CacheMeta) -> int:
    """Return the bytes of all chunk files of a complete cache, without keys and manifest."""
    cache = Cache(Path(), meta)
    return sum(cache.copies(name) * meta.num_blocks * chunk_bytes(cache, name) for name in cache.fields)


def chunk_shape(cache: Cache, name: str) -> tuple[int, ...]:
    """Return [block rows, *shape], or [block rows, 1, *shape] for a field with texts or views."""
    field = cache.fields[name]
    inner = (1, *field.shape) if field.copies(cache.meta.texts, cache.meta.views) else field.shape
    return (cache.meta.block_rows, *inner)


def chunk_bytes(cache: Cache, name: str) -> int:
    """Return the bytes of the values of a chunk."""
    return int(np.prod(chunk_shape(cache, name))) * np.dtype(cache.fields[name].dtype).itemsize


def metadata(meta: CacheMeta) -> dict[str, bytes]:
    """Return every zarr.json of a cache by its relative path, written by zarr, the one of the group last."""
    files: dict[str, Buffer] = {}
    memory, cache = MemoryStore(files), Cache(Path(), meta)
    group = zarr.create_group(memory, zarr_format=3, attributes={**to_dict(meta), "checksum": checksum(meta)})
    for field in cache.fields.values():
        group.create_array(
            field.name,
            shape=field.array_shape(meta.rows, meta.texts, meta.views),
            chunks=chunk_shape(cache, field.name),
            dtype=field.dtype,
            compressors=[Crc32cCodec()],
            fill_value=False if field.dtype == "bool" else 0,
            dimension_names=field.array_dims(meta.views),
            attributes={"doc": field.doc},
        )
    group.create_array(
        "key", shape=(meta.rows,), chunks=(meta.block_rows,), dtype=str, dimension_names=("row",)
    )
    contents = {
        name: buffer.to_bytes() for name, buffer in sorted(files.items()) if name.endswith("zarr.json")
    }
    return {
        **{name: content for name, content in contents.items() if "/" in name},
        "zarr.json": contents["zarr.json"],
    }


def chunk_path(cache: Cache, name: str, block: int, copy: int = 0) -> Path:
    """Return the chunk file of a block of a field, and of one text or view if it has several."""
    if name == "key":
        return cache.path.joinpath("key", "c", str(block))
    field = cache.fields[name]
    outer = [str(copy)] if field.copies(cache.meta.texts, cache.meta.views) else []
    return cache.path.joinpath(name, "c", str(block), *outer, *["0"] * len(field.shape))


def encode(cache: Cache, name: str, values: np.ndarray, rows: int) -> bytes:
    """Encode a chunk as zarr does; the rows that a last block lacks are zeros."""
    if len(values) != rows:
        raise ValueError(f"{name} has {len(values)} rows, its block {rows}")
    if name != "key" and (values.shape[1:], values.dtype) != (
        cache.fields[name].shape,
        cache.fields[name].dtype,
    ):
        raise ValueError(f"{name} is {values.dtype} {values.shape}, not a chunk of {cache.fields[name]}")
    files: dict[str, Buffer] = {}
    size = cache.meta.block_rows
    with zarr.config.set({"array.write_empty_chunks": True}):
        if name == "key":
            array = zarr.create_array(MemoryStore(files), shape=(size,), chunks=(size,), dtype=str)
        else:
            shape = (size, *values.shape[1:])
            array = zarr.create_array(
                MemoryStore(files),
                shape=shape,
                chunks=shape,
                dtype=values.dtype,
                compressors=[Crc32cCodec()],
                fill_value=0,
            )
        array[:rows] = values
    return next(buffer.to_bytes() for file, buffer in files.items() if not file.endswith("zarr.json"))


def is_record(record: Mapping[str, Any], block: int) -> bool:
    """Return whether the entries of a done record have the types that its readers expect."""
    numbers = [record["block"], *record["rows"], record["texts"], record["views"]]
    numbers += [number for facts in record["files"].values() for number in facts]
    entries = record["invalid"]
    return (
        record["block"] == block
        and len(record["rows"]) == 2
        and all(type(number) is int and number >= 0 for number in numbers)
        and all(len(facts) == 2 and not Path(name).is_absolute() for name, facts in record["files"].items())
        and isinstance(entries, list)
        and all(type(entry["row"]) is int and isinstance(entry["reason"], str) for entry in entries)
    )
