"""Pictures inside Parquet and Arrow files, one row at a time, safe in forked workers. Not for texts: see `readers/`.

A Parquet file is read one row group at a time; an Arrow file, as Hugging Face `datasets` saves them, is mapped into
memory and only the bytes of the row are touched. Both are read with pyarrow alone and without its threads. At a URL
a column of a Parquet row group is one request.
"""

import functools
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from teachercache.core.paths import is_url
from teachercache.core.urls import below, open_file, read_range

if TYPE_CHECKING:
    import pyarrow as pa

COLUMN_FILES = (".parquet", ".arrow")
PICTURE_COLUMNS = ("image", "img", "picture", "jpg", "jpeg", "png", "webp", "image_bytes", "bytes")
PATH_COLUMNS = ("image", "image_path", "filepath", "file_name", "filename", "path", "img_path")
WHOLE_GROUP_BYTES = 256 << 20  # of a row group that is kept whole; a larger one is read 64 rows at a time


def picture_column(schema: "pa.Schema") -> str:
    """The column that holds pictures as bytes, or as Hugging Face's struct of `bytes` and `path`; "" if none does."""
    return next(
        (name for name in PICTURE_COLUMNS if name in schema.names and _holds_bytes(schema.field(name).type)),
        "",
    )


def _holds_bytes(kind: "pa.DataType") -> bool:
    import pyarrow.types as types

    if types.is_struct(kind):
        return kind.get_field_index("bytes") >= 0 and _holds_bytes(kind.field("bytes").type)
    return types.is_binary(kind) or types.is_large_binary(kind)


def picture_in_row(path: Any, row: int) -> bytes:
    """The bytes of a row's picture; OSError or LookupError with a reason where there are none."""
    import pyarrow as pa

    opened = _open_parquet if path.suffix.lower() == ".parquet" else _open_arrow
    # by process: a forked worker must not share a reader's place; by time and size: the file may be written again.
    # At a URL that question would cost a request for each picture.
    written = (0, 0) if is_url(path) else ((facts := path.stat()).st_mtime_ns, facts.st_size)
    try:
        value = opened(path, os.getpid(), *written).cell(row)
    except pa.ArrowException as error:
        raise LookupError(f"{path.name} is damaged: {error}") from error
    if isinstance(value, dict):
        if value["bytes"] is None and value.get("path"):
            return _beside(path, value["path"])
        value = value["bytes"]
    if value is None:
        raise LookupError("the row has no picture")
    return value


def _beside(path: Any, name: str) -> bytes:
    """A picture that a cell names instead of holding it; only from the folder of the file itself."""
    folder = path.parent if is_url(path) else path.parent.resolve()
    beside = below(folder, name) if is_url(path) else (folder / name).resolve()
    if not beside.is_relative_to(folder):
        raise LookupError(f"the picture's path leads out of the folder of {path.name}")
    return read_range(beside) if is_url(beside) else beside.read_bytes()


@functools.lru_cache(maxsize=2)
def _open_parquet(path: Any, process: int, changed: int, size: int) -> "ParquetPictures":
    return ParquetPictures(path)


@functools.lru_cache(maxsize=256)
def _open_arrow(path: Path, process: int, changed: int, size: int) -> "ArrowPictures":
    return ArrowPictures(path)


class ParquetPictures:
    """The picture column of a Parquet file with one row group, or a piece of a large one, in memory."""

    def __init__(self, path: Any):
        self.file = open_parquet(path)
        self.column = picture_column(self.file.schema_arrow)
        groups = range(self.file.metadata.num_row_groups)
        self.rows = [self.file.metadata.row_group(group).num_rows for group in groups]
        self.group, self.first, self.values = -1, 0, []  # type: tuple[int, int, Any]
        self.pieces: Iterator[Any] = iter(())

    def cell(self, row: int) -> Any:
        """What the column holds in a row."""
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
                self.group = -1  # what was interrupted begins anew
                raise
        return self.values[row - self.first].as_py()


class ArrowPictures:
    """The picture column of an Arrow file (stream or random access), mapped."""

    def __init__(self, path: Path):
        table = open_arrow(path)
        self.values = table.column(picture_column(table.schema))

    def cell(self, row: int) -> Any:
        """What the column holds in a row."""
        if row >= len(self.values):
            raise LookupError(f"the file has {len(self.values)} rows, not {row + 1}")
        return self.values[row].as_py()


def open_parquet(path: Any) -> Any:
    """A ParquetFile: mapped, or at a URL read by ranges, without reading ahead of what is asked for."""
    import pyarrow.parquet as pq

    return pq.ParquetFile(open_file(path, 0)) if is_url(path) else pq.ParquetFile(path, memory_map=True)


def open_arrow(path: Path) -> "pa.Table":
    """A mapped table: nothing is copied, pages come in as they are touched."""
    import pyarrow as pa

    source = pa.memory_map(str(path))
    try:
        return pa.ipc.open_stream(source).read_all()
    except pa.ArrowInvalid:
        return pa.ipc.open_file(source).read_all()


def group_bytes(metadata: Any, group: int, column: str, *, stored: bool) -> int:
    """Bytes of a column in one row group, from the footer: as stored (compressed) or as read."""
    chunks = [metadata.row_group(group).column(i) for i in range(metadata.num_columns)]
    own = [chunk for chunk in chunks if chunk.path_in_schema.split(".")[0] == column]
    return sum(chunk.total_compressed_size if stored else chunk.total_uncompressed_size for chunk in own)
