"""The manifest: one row per image or text with a stable key, texts and labels.

`readers/` reads each format; `views.py` makes tensors.
"""

import collections
import dataclasses
import hashlib
import io
import itertools
import json
import re
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from teachercache.core.errors import UserError, is_machine
from teachercache.core.paths import as_path, is_url, stream_whole
from teachercache.core.urls import tidy
from teachercache.data.foreign import SPLITS, clean, split_of
from teachercache.data.sample import Sample
from teachercache.data.unused import Unused, from_json

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa

ALL = "checksum_of_all"  # of the metadata of a stored manifest: the checksum of the rest
WRITER = "parquet-cpp-arrow version {}"
ROWS_AT_ONCE = 8192  # rows held as Python objects before they are converted to Arrow
# The characters that str.strip() removes; Arrow's trimming keeps the separators 1c to 1f
SPACES = (
    r"\x{09}-\x{0d}\x{1c}-\x{20}\x{85}\x{a0}\x{1680}\x{2000}-\x{200a}\x{2028}\x{2029}\x{202f}\x{205f}\x{3000}"
)


@dataclasses.dataclass(frozen=True)
class Manifest:
    """All rows of a dataset in an Arrow table.

    Attributes:
        data: The value of `--data`.
        root: The Path or UPath that the paths of images are relative to.
        table: The rows, with the columns of `schema`.
        digest: The digest of keys, image files, texts and tasks.
        unused: What the readers saw and did not use.
    """

    data: str
    root: Path
    table: "pa.Table"
    digest: str
    unused: Unused = dataclasses.field(default_factory=Unused)

    def __len__(self) -> int:
        return self.table.num_rows

    @property
    def texts(self) -> int:
        """The largest number of texts of a row."""
        import pyarrow.compute as pc

        return pc.max(pc.list_value_length(self.table["texts"])).as_py() or 0

    @property
    def has_images(self) -> bool:
        """Whether any row has an image."""
        import pyarrow.compute as pc

        return pc.any(pc.not_equal(self.table["image"], "")).as_py()

    def row(self, index: int) -> Sample:
        """Return one row as a record."""
        values = {name: self.table[name][index].as_py() for name in self.table.column_names}
        return Sample(**{**values, "texts": tuple(values["texts"])})

    def column(self, name: str) -> list[Any]:
        """Return one column as a list."""
        return self.table[name].to_pylist()

    def rows_of_split(self, split: str) -> "np.ndarray":
        """Return the rows of a split [n] by any of its words (valid is val), or all rows if the data has no splits."""
        import numpy as np
        import pyarrow.compute as pc

        present = [word for word in pc.unique(self.table["split"]).to_pylist() if word]
        if not present:
            return np.arange(len(self))
        same = split_of(split) or split
        words = pa_strings([word for word in present if word == split or split_of(word) == same])
        return np.flatnonzero(pc.is_in(self.table["split"], words).to_numpy())

    def has_text(self) -> "np.ndarray":
        """Return whether each row has a text that is not blank, bool [rows]."""
        import numpy as np
        import pyarrow.compute as pc

        texts = self.table["texts"]
        filled = ~pc.match_substring_regex(pc.list_flatten(texts), rf"\A[{SPACES}]*\z").to_numpy()
        mask = np.zeros(len(self), bool)
        mask[pc.list_parent_indices(texts).to_numpy()[filled]] = True
        return mask


def pa_strings(values: list[str]) -> "pa.Array":
    """Return an Arrow array of strings, of that type even if it is empty."""
    import pyarrow as pa

    return pa.array(values, pa.string())


def schema() -> "pa.Schema":
    """Return the schema of the table."""
    import pyarrow as pa

    return pa.schema(
        [
            ("key", pa.string()),
            ("image", pa.string()),
            ("texts", pa.list_(pa.string())),
            ("label", pa.string()),
            ("split", pa.string()),
            ("offset", pa.int64()),
            ("size", pa.int64()),
            ("problem", pa.string()),
            ("task", pa.string()),
        ]
    )


def make_manifest(
    data: str,
    root: Path,
    samples: Iterable[Sample],
    *,
    unused: Unused | None = None,
    limit: int | None = None,
) -> Manifest:
    """Collect rows into a Manifest; raise UserError if there are none or a key is repeated.

    Args:
        data: The value of `--data`.
        root: What the paths of images are relative to.
        samples: The rows.
        unused: The counts that the reader of the rows adds to.
        limit: The largest number of rows; None for all.
    """
    import pyarrow as pa
    import pyarrow.compute as pc

    rows = itertools.islice(samples, limit)
    batches = []
    while part := list(itertools.islice(rows, ROWS_AT_ONCE)):
        columns = _columns(data, part)
        batches.append(pa.RecordBatch.from_arrays(columns, schema=schema()))
    if not batches:
        seen = "".join(f"{line}; " for line in unused.lines()) if unused else ""
        raise UserError(
            f"no pictures or texts found in {data}: {seen}see `tc build --help` for the formats that are read"
        )
    table = pa.Table.from_batches(batches)
    if pc.count_distinct(table["key"]).as_py() < len(table):  # counted in Arrow, where strings are smaller
        counts = pc.value_counts(table["key"])
        key = counts.field("values")[pc.index(pc.greater(counts.field("counts"), 1), value=True).as_py()]
        in_tar = pc.any(pc.ends_with(table["image"], ".tar", ignore_case=True)).as_py()
        sort = "; members of one key lie side by side in a tar: tar --sort=name" if in_tar else ""
        raise UserError(f"key '{key}' is repeated in {data}: give every row its own key or file name{sort}")
    return Manifest(tidy(data), root, table, digest_rows(table), unused or Unused())


def _columns(data: str, rows: list[Sample]) -> "list[pa.Array]":
    """Convert rows to Arrow, splits to the words of `SPLITS`; half emojis in texts are replaced.

    Raises:
        UserError: A key or the path of an image has characters that UTF-8 cannot hold.
    """
    import pyarrow as pa

    names = [field.name for field in schema()]
    values = {name: [getattr(row, name) for row in rows] for name in names}
    values["split"] = [split_of(word) or word for word in values["split"]]
    try:
        return [pa.array(values[field.name], field.type) for field in schema()]
    except UnicodeEncodeError:
        pass
    for sample in rows:
        if any(clean(name) != name for name in (sample.key, sample.image)):
            raise UserError(f"{sample.image!r} in {data} has a name that is not UTF-8: rename it")
    values["texts"] = [[clean(text) for text in texts] for texts in values["texts"]]
    for name in ("label", "split", "problem", "task"):
        values[name] = [clean(text) for text in values[name]]
    return [pa.array(values[field.name], field.type) for field in schema()]


def rows_without_split(manifest: Manifest) -> list[str]:
    """Return a line for each word that names no split, and for rows without one, beside rows of known splits."""
    counts = collections.Counter(manifest.column("split"))
    known = [split for split in SPLITS if counts[split]]
    others = {word: count for word, count in counts.items() if word not in SPLITS} if known else {}
    beside = f"beside {', '.join(f'{counts[split]:,} of {split}' for split in known)}"
    return [
        f"{count:,} rows {f'are of the unknown split {word!r}' if word else 'have no split'} {beside}: "
        "they are part of no split"
        for word, count in others.items()
    ]


def digest_rows(table: "pa.Table") -> str:
    """Return the sha256 over the key, image reference, image size, texts and task of every row, in any
    order.
    """
    import numpy as np

    return hashlib.sha256(np.sort(row_digests(table)).tobytes()).hexdigest()


def row_digests(table: "pa.Table") -> "np.ndarray":
    """Return the contribution of each row to `digest_rows`: sixteen bytes, dtype S16 [rows]."""
    import numpy as np

    digests = bytearray()
    for batch in table.select(["key", "image", "offset", "size", "texts", "task"]).to_batches(
        max_chunksize=4096
    ):
        for row in batch.to_pylist():
            digests += hashlib.blake2b(repr(tuple(row.values())).encode(), digest_size=16).digest()
    return np.frombuffer(digests, "S16")


def write_manifest(manifest: Manifest, path: Path) -> None:
    """Write a Parquet file that `--data` accepts, atomically."""
    meta = {"data": manifest.data, "root": str(manifest.root), "digest": manifest.digest}
    meta |= {"checksum": _checksum(meta), "unused": json.dumps(manifest.unused.as_json())}
    table = manifest.table.replace_schema_metadata({**meta, ALL: _checksum(meta)})
    stream_whole(path, lambda file: _write_table(table, file))


def _write_table(table: "pa.Table", file: IO[bytes]) -> None:
    """Write the same bytes for the same rows, whatever the chunks of their columns."""
    import pyarrow.parquet as pq

    pq.write_table(table.combine_chunks(), file, write_page_checksum=True)


def is_as_written(path: Path) -> bool:
    """Return whether a manifest has the bytes that `write_manifest` wrote: what it holds is written again, in memory.

    A manifest of another version of pyarrow, or of an earlier version of this program, is not compared.

    Raises:
        UserError: It cannot be read.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    content = path.read_bytes()
    try:
        table = pq.read_table(io.BytesIO(content), page_checksum_verification=True)
        writer = pq.read_metadata(io.BytesIO(content)).created_by
    except (pa.ArrowException, ValueError, OSError) as error:
        raise UserError(f"{path} is not a readable Parquet file: {error}") from error
    meta = {_text(key): _text(value) for key, value in (table.schema.metadata or {}).items()}
    if meta.keys() <= {"data", "root", "digest", "checksum", "unused"}:
        return True
    if meta.pop(ALL, None) != _checksum(meta):
        return False
    if writer != WRITER.format(pa.cpp_version) and re.fullmatch(WRITER.format(r"\d+\.\d+\.\d+"), writer):
        return True
    fields = [
        field.with_type(pa.list_(field.type.value_type)) if pa.types.is_list(field.type) else field
        for field in table.schema
    ]
    again = io.BytesIO()  # Parquet renames the items of lists
    _write_table(table.cast(pa.schema(fields, table.schema.metadata)), again)
    return again.getvalue() == content


def _text(name: bytes) -> str:
    return name.decode("utf-8", "replace")


def load_manifest(path: Path) -> Manifest:
    """Load a manifest that `write_manifest` wrote."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    source = (
        io.BytesIO(path.read_bytes()) if is_url(path) else path
    )  # read first, so that a lost connection is reported as such
    try:
        table = pq.read_table(source, page_checksum_verification=True)
        if "task" not in table.column_names:  # written by a version without task columns
            table = table.append_column("task", pa.array([""] * len(table), pa.string()))
        missing = [name for name in schema().names if name not in table.column_names]
        meta = {key.decode(): value.decode() for key, value in (table.schema.metadata or {}).items()}
        table = table if missing else table.select(schema().names).cast(schema())
    except FileNotFoundError:
        raise
    except (pa.ArrowException, ValueError, OSError) as error:
        if isinstance(error, OSError) and is_machine(error):
            raise OSError(error.errno, error.strerror or str(error), str(path)) from error
        raise UserError(f"{path} is not a readable Parquet file: {error}") from error
    if missing or "root" not in meta:
        raise UserError(f"{path} is not a manifest (no {', '.join(missing) or 'root'})")
    stored = {name: meta.get(name, "") for name in ("data", "root", "digest")}
    if meta.get("checksum", _checksum(stored)) != _checksum(stored):
        raise UserError(f"{path} is damaged: the checksum of its root differs")
    try:
        unused = from_json(json.loads(meta.get("unused", "{}")))
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
        raise UserError(f"{path} is damaged: its counts of what is not used cannot be read") from error
    return Manifest(stored["data"], as_path(stored["root"]), table, stored["digest"], unused)


def manifest_keys(path: Path) -> Iterator["pa.Array"]:
    """Yield the keys of a stored manifest in order, in chunks: the table is never in memory as a whole."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    source = io.BytesIO(path.read_bytes()) if is_url(path) else path
    try:
        with pq.ParquetFile(source, page_checksum_verification=True) as file:
            for batch in file.iter_batches(ROWS_AT_ONCE, columns=["key"]):
                yield batch.column(0).cast(pa.string())
    except FileNotFoundError:
        raise
    except (pa.ArrowException, ValueError, OSError, LookupError) as error:
        raise UserError(f"{path} is not a readable manifest: {error}") from error


def _checksum(meta: dict[str, str]) -> str:
    return str(zlib.crc32(json.dumps(meta, sort_keys=True).encode()))


# ----------------------------------------------------------------------------------------------------
# Pictures
