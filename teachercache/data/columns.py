"""Read images from Parquet and Arrow files, one row at a time, safely in forked workers. `readers/` reads the
texts.

A Parquet file is read one row group at a time. An Arrow file, as Hugging Face `datasets` saves it, is
memory-mapped. Both use pyarrow without its threads. At a URL a column of a Parquet row group is one request.
"""

import functools
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from teachercache.core.paths import is_url
from teachercache.core.urls import below, open_file, read_range

if TYPE_CHECKING:
    import pyarrow as pa

COLUMN_FILES = (".parquet", ".arrow")
PICTURE_COLUMNS = ("image", "img", "picture", "jpg", "jpeg", "png", "webp", "image_bytes", "bytes")
PATH_COLUMNS = ("image", "image_path", "filepath", "file_name", "filename", "path", "img_path")
WHOLE_GROUP_BYTES = (
    256 << 20
)  # a row group up to this size is kept in memory; a larger one is read 64 rows at a time


def picture_column(schema: "pa.Schema") -> str:
    """Return the column that holds images, as bytes or as Hugging Face's struct of `bytes` and `path`, or
    "".
    """
    named = columns_named(schema, PICTURE_COLUMNS)
    return next((name for name in named if _holds_bytes(schema.field(name).type)), "")


def columns_named(schema: "pa.Schema", names: Sequence[str]) -> list[str]:
    """Return the columns that have one of some names, in the order of these names; case and spaces around a column's
    name do not count. A name that two columns have is in none of them.
    """
    return [
        column
        for name in names
        for column in schema.names
        if column.strip().lower() == name and schema.names.count(column) == 1
    ]


def of_strings(kind: "pa.DataType") -> bool:
    """Return whether a column holds strings, also as a dictionary (pandas' categories)."""
    import pyarrow.types as types

    kind = kind.value_type if types.is_dictionary(kind) else kind
    return types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind)


def of_bytes(kind: "pa.DataType") -> bool:
    """Return whether a column holds bytes, also as a dictionary."""
    import pyarrow.types as types

    kind = kind.value_type if types.is_dictionary(kind) else kind
    return types.is_binary(kind) or types.is_large_binary(kind) or types.is_binary_view(kind)


def _holds_bytes(kind: "pa.DataType") -> bool:
    import pyarrow.types as types

    if types.is_struct(kind):
        return kind.get_field_index("bytes") >= 0 and of_bytes(kind.field("bytes").type)
    return of_bytes(kind)


def picture_in_row(path: Path, row: int) -> bytes:
    """Return the bytes of the image of a row; raise OSError or LookupError with a reason if there are
    none, and MemoryError if they do not fit into memory.
    """
    import pyarrow as pa

    opened = _open_parquet if path.suffix.lower() == ".parquet" else _open_arrow
    # The process is part of the key because a forked worker must not share a reader's position; time and size because the
    # file may be rewritten. At a URL checking that would cost a request per image.
    written = (0, 0) if is_url(path) else ((facts := path.stat()).st_mtime_ns, facts.st_size)
    try:
        value = opened(path, os.getpid(), *written).cell(row)
    except MemoryError:  # pyarrow's is an ArrowException too
        raise
    except pa.ArrowException as error:
        raise LookupError(f"{path.name} is damaged: {error}") from error
    if isinstance(value, dict):
        if value["bytes"] is None and value.get("path"):
            return _beside(path, value["path"])
        value = value["bytes"]
    if value is None:
        raise LookupError("the row has no picture")
    return value


def _beside(path: Path, name: str) -> bytes:
    """Read an image that a cell refers to by path; the path must lie in the folder of the file."""
    folder = path.parent if is_url(path) else path.parent.resolve()
    try:
        beside = below(folder, name) if is_url(path) else (folder / name).resolve()
    except ValueError as error:  # a NUL in the name
        raise LookupError(f"the picture's path is none: {error}") from error
    if not beside.is_relative_to(folder):
        raise LookupError(f"the picture's path leaves the folder of {path.name}")
    if is_url(beside):
        return read_range(beside)
    try:
        return beside.read_bytes()
    except FileNotFoundError as error:  # the size of the row is that of its cell: nobody has listed this file
        raise LookupError(f"cannot open the picture: there is no {name} beside {path.name}") from error


@functools.lru_cache(maxsize=2)
def _open_parquet(path: Path, process: int, changed: int, size: int) -> "ParquetPictures":
    return ParquetPictures(path)


@functools.lru_cache(maxsize=256)
def _open_arrow(path: Path, process: int, changed: int, size: int) -> "ArrowPictures":
    return ArrowPictures(path)


class ParquetPictures:
    """The image column of a Parquet file, with one row group, or a part of a large one, in memory."""

    def __init__(self, path: Path):
        self.file = open_parquet(path)
        self.column = picture_column(self.file.schema_arrow)
        groups = range(self.file.metadata.num_row_groups)
        self.rows = [self.file.metadata.row_group(group).num_rows for group in groups]
        self.group, self.first, self.values = -1, 0, []  # type: tuple[int, int, Any]
        self.pieces: Iterator[Any] = iter(())

    def cell(self, row: int) -> Any:
        """Return the value of the column in a row."""
        group, start = 0, 0
        while group < len(self.rows) and row >= start + self.rows[group]:
            start, group = start + self.rows[group], group + 1
        if group == len(self.rows):
            raise LookupError(f"the file has {start} rows, not {row + 1}")
        if group != self.group or row < self.first:
            self.group, self.first, self.values = group, start, []
            large = group_bytes(self.file.metadata, group, self.column, stored=False) > WHOLE_GROUP_BYTES
            size = 64 if large else max(self.rows[group], 1)
            self.pieces = self.file.iter_batches(
                size, row_groups=[group], columns=[self.column], use_threads=False
            )
        while row >= self.first + len(self.values):
            self.first += len(self.values)
            try:
                self.values = next(self.pieces).column(0)
            except BaseException:
                self.group = -1  # an interrupted read starts again
                raise
        return self.values[row - self.first].as_py()


class ArrowPictures:
    """The image column of an Arrow file (stream or random access), memory-mapped."""

    def __init__(self, path: Path):
        table = open_arrow(path)
        self.values = table.column(picture_column(table.schema))

    def cell(self, row: int) -> Any:
        """Return the value of the column in a row."""
        if row >= len(self.values):
            raise LookupError(f"the file has {len(self.values)} rows, not {row + 1}")
        return self.values[row].as_py()


def open_parquet(path: Path) -> Any:
    """Open a ParquetFile: memory-mapped, or at a URL with ranged reads and no read-ahead."""
    import pyarrow.parquet as pq

    return pq.ParquetFile(open_file(path, 0)) if is_url(path) else pq.ParquetFile(path, memory_map=True)


def open_arrow(path: Path) -> "pa.Table":
    """Return a memory-mapped table."""
    import pyarrow as pa

    source = pa.memory_map(str(path))
    try:
        return pa.ipc.open_stream(source).read_all()
    except pa.ArrowInvalid:
        return pa.ipc.open_file(source).read_all()


def group_bytes(metadata: Any, group: int, column: str, *, stored: bool) -> int:
    """Return the bytes of a column in one row group, stored (compressed) or in memory, from the footer."""
    chunks = [metadata.row_group(group).column(i) for i in range(metadata.num_columns)]
    column_chunks = [chunk for chunk in chunks if chunk.path_in_schema.split(".")[0] == column]
    return sum(
        chunk.total_compressed_size if stored else chunk.total_uncompressed_size for chunk in column_chunks
    )
