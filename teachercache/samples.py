"""The manifest: one row per picture with a stable key, its texts and its labels; and how a row's picture is read.

Readers for each input format are in `readers/`. Not for tensors: see `views.py`.
"""

import dataclasses
import hashlib
import io
import itertools
import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from teachercache.columns import COLUMN_FILES, picture_in_row
from teachercache.names import UserError

if TYPE_CHECKING:
    import pyarrow as pa
    from PIL import Image

ROWS_AT_ONCE = 8192  # rows that are Python objects at one time, on their way into the Arrow table
MAX_PIXELS = 89_478_485  # PIL's own warning level: about 256 MB of RGB


class BadSample(Exception):
    """One row cannot be used; the message is the reason, for quarantine.jsonl."""


@dataclasses.dataclass(frozen=True)
class Sample:
    """One row. `offset` is -1 where `image` is a whole file, else the picture lies inside it.

    In a tar `offset` is its first byte and `size` its bytes; in a Parquet or Arrow file `offset` is its row.
    """

    key: str
    image: str  # path below the manifest's root, "" where the row has no picture
    texts: tuple[str, ...] = ()
    label: str = ""
    split: str = ""
    offset: int = -1
    size: int = 0  # bytes of the picture; in Parquet of its row group, where its own would mean reading everything
    problem: str = ""  # why the row cannot be used, where its reader found out
    task: str = ""  # canonical JSON of `task_columns`: question, choices, answers, label, boxes; "" where there is none


@dataclasses.dataclass(frozen=True)
class Manifest:
    """All rows of a data set, in an Arrow table; `root` is where their paths start."""

    data: str  # what `--data` was
    root: Path
    table: "pa.Table"
    digest: str

    def __len__(self) -> int:
        return self.table.num_rows

    @property
    def texts(self) -> int:
        """Texts per row: the most that any row has."""
        import pyarrow.compute as pc

        return pc.max(pc.list_value_length(self.table["texts"])).as_py() or 0

    def row(self, index: int) -> Sample:
        """One row as a record."""
        values = {name: self.table[name][index].as_py() for name in self.table.column_names}
        return Sample(**{**values, "texts": tuple(values["texts"])})

    def column(self, name: str) -> list[Any]:
        """One column as a Python list."""
        return self.table[name].to_pylist()

    def rows_of_split(self, split: str) -> list[int]:
        """Rows of a split, all rows where the data has no splits at all."""
        splits = self.column("split")
        if not any(splits):
            return list(range(len(splits)))
        return [i for i, name in enumerate(splits) if name == split]


def schema() -> "pa.Schema":
    """Columns of a manifest."""
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


def task_columns(**columns: Any) -> str:
    """What `Sample.task` holds: one JSON object, keys sorted, columns that are None left out."""
    kept = {name: value for name, value in columns.items() if value is not None}
    return json.dumps(kept, sort_keys=True, ensure_ascii=False, separators=(",", ":"), default=str)


def make_manifest(data: str, root: Path, samples: Iterable[Sample], *, limit: int | None = None) -> Manifest:
    """Rows into a Manifest; UserError where there are none or a key comes twice."""
    import pyarrow as pa
    import pyarrow.compute as pc

    rows = itertools.islice(samples, limit)
    batches = []
    while part := list(itertools.islice(rows, ROWS_AT_ONCE)):
        for sample in part:
            if any(name.encode("utf-8", "replace").decode() != name for name in (sample.key, sample.image)):
                raise UserError(f"{sample.image!r} in {data} has a name that is not UTF-8: rename it")
        columns = [pa.array([getattr(row, field.name) for row in part], field.type) for field in schema()]
        batches.append(pa.RecordBatch.from_arrays(columns, schema=schema()))
    if not batches:
        raise UserError(f"no pictures or texts found in {data}: see `tc build --help` for the formats that are read")
    table = pa.Table.from_batches(batches)
    if pc.count_distinct(table["key"]).as_py() < len(table):  # counted in Arrow: Python strings are larger
        counts = pc.value_counts(table["key"])
        key = counts.field("values")[pc.index(pc.greater(counts.field("counts"), 1), value=True).as_py()]
        raise UserError(f"key '{key}' comes twice in {data}: give every row its own key or file name")
    return Manifest(os.path.normpath(data), root, table, digest_rows(table))


def digest_rows(table: "pa.Table") -> str:
    """sha256 over every row's key, picture reference, picture size, texts and task; the root is left out."""
    digest = hashlib.sha256()
    for batch in table.select(["key", "image", "offset", "size", "texts", "task"]).to_batches(max_chunksize=4096):
        for row in batch.to_pylist():
            task = row.pop("task")  # only where there is one: rows without keep the digest they had before it existed
            digest.update(repr((*row.values(), task) if task else tuple(row.values())).encode())
    return digest.hexdigest()


def write_manifest(manifest: Manifest, path: Path) -> None:
    """Parquet that `--data` takes; written aside and renamed."""
    import pyarrow.parquet as pq

    meta = {"data": manifest.data, "root": str(manifest.root), "digest": manifest.digest}
    partial = path.with_name(path.name + ".partial")
    pq.write_table(manifest.table.replace_schema_metadata(meta), partial)
    os.replace(partial, path)


def load_manifest(path: Path) -> Manifest:
    """The manifest that `write_manifest` wrote."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        table = pq.read_table(path)
    except (pa.ArrowInvalid, OSError) as error:
        raise UserError(f"{path} is not a readable Parquet file: {error}") from error
    meta = {key.decode(): value.decode() for key, value in (table.schema.metadata or {}).items()}
    if "task" not in table.column_names:  # written before there were task columns
        table = table.append_column("task", pa.array([""] * len(table), pa.string()))
    missing = [name for name in schema().names if name not in table.column_names]
    if missing or "root" not in meta:
        raise UserError(f"{path} is not a manifest (no {', '.join(missing) or 'root'})")
    return Manifest(meta["data"], Path(meta["root"]), table.select(schema().names), meta["digest"])


# ----------------------------------------------------------------------------------------------------
# Pictures


def read_image(manifest: Manifest, sample: Sample) -> "Image.Image":
    """The row's picture as a person sees it, RGB; BadSample with the reason where it cannot be read."""
    path = manifest.root / sample.image
    try:
        if sample.offset >= 0 and path.suffix.lower() in COLUMN_FILES:
            return decode_image(picture_in_row(path, sample.offset))
        with open(path, "rb") as file:
            if sample.offset >= 0:
                file.seek(sample.offset)
                content = file.read(sample.size)
            else:
                content = file.read()
    except OSError as error:
        raise BadSample(f"cannot open the picture: {error.strerror or error}") from error
    except LookupError as error:
        raise BadSample(str(error.args[0])) from error
    return decode_image(content)


def decode_image(content: bytes) -> "Image.Image":
    """Bytes to RGB: EXIF turned, alpha on white, 16 bit scaled, first frame; BadSample where not a picture."""
    import warnings

    from PIL import Image, ImageOps, UnidentifiedImageError

    if not content:
        raise BadSample("the picture has no bytes")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PIL warns of every odd tag; what cannot be read gets its reason below
            image = Image.open(io.BytesIO(content))
            if image.width * image.height > MAX_PIXELS:
                raise BadSample(f"{image.width} x {image.height} pixels are more than the limit of {MAX_PIXELS:,}")
            image.load()
            return _flatten(ImageOps.exif_transpose(image))
    except BadSample:
        raise
    except UnidentifiedImageError as error:
        raise BadSample("not a picture in a known format") from error
    except Image.DecompressionBombError as error:
        raise BadSample("far more pixels than a picture has (decompression bomb)") from error
    except Exception as error:  # fuzzed files make PIL raise RuntimeError, struct.error and more
        raise BadSample(f"the picture is damaged: {error}") from error


def _flatten(image: "Image.Image") -> "Image.Image":
    """Any mode to RGB, the way a viewer on a white page shows it."""
    from PIL import Image

    if image.mode.startswith(("I", "F")):  # 16 or 32 bit grey: PIL's own convert clips at 255
        import numpy as np

        values = np.asarray(image, dtype=np.float64)
        wide = image.mode.startswith("I;16") or (image.mode == "I" and values.max(initial=0) > 255)
        scale = 257.0 if wide else 1.0
        image = Image.fromarray(np.clip(values / scale, 0, 255).astype(np.uint8))
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        image = Image.alpha_composite(white, image)
    return image if image.mode == "RGB" else image.convert("RGB")


def clean_texts(sample: Sample) -> Iterator[tuple[str, bool]]:
    """Each text of a row with whether it can be used."""
    for text in sample.texts:
        yield text, bool(text.strip())
