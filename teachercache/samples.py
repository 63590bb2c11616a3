"""The manifest: one row per picture with a stable key, its texts and its labels; and how a row's picture is read.

Readers for each input format are in `readers/`. Not for tensors: see `views.py`.
"""

import dataclasses
import functools
import hashlib
import io
import itertools
import json
import zlib
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

from teachercache.columns import COLUMN_FILES, picture_in_row
from teachercache.names import UserError
from teachercache.paths import as_path, is_url, stream_whole
from teachercache.remote import below, here, persistently, read_range, tidy

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa
    from PIL import Image

ROWS_AT_ONCE = 8192  # rows that are Python objects at one time, on their way into the Arrow table
# What str.strip() leaves nothing of; Arrow's own trimming spares the separators 1c to 1f
SPACES = (
    r"\x{09}-\x{0d}\x{1c}-\x{20}\x{85}\x{a0}\x{1680}\x{2000}-\x{200a}\x{2028}\x{2029}\x{202f}\x{205f}\x{3000}"
)
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
    size: int = (
        0  # bytes of the picture; in Parquet of its row group, where its own would mean reading everything
    )
    problem: str = ""  # why the row cannot be used, where its reader found out
    task: str = ""  # canonical JSON of `task_columns`: question, choices, answers, label, boxes; "" where there is none


@dataclasses.dataclass(frozen=True)
class Manifest:
    """All rows of a data set, in an Arrow table; `root` is where their paths start."""

    data: str  # what `--data` was
    root: Any  # a Path, or a UPath
    table: "pa.Table"
    digest: str

    def __len__(self) -> int:
        return self.table.num_rows

    @property
    def texts(self) -> int:
        """Texts per row: the most that any row has."""
        import pyarrow.compute as pc

        return pc.max(pc.list_value_length(self.table["texts"])).as_py() or 0

    @property
    def has_images(self) -> bool:
        """Whether any row names a picture."""
        import pyarrow.compute as pc

        return pc.any(pc.not_equal(self.table["image"], "")).as_py()

    def row(self, index: int) -> Sample:
        """One row as a record."""
        values = {name: self.table[name][index].as_py() for name in self.table.column_names}
        return Sample(**{**values, "texts": tuple(values["texts"])})

    def column(self, name: str) -> list[Any]:
        """One column as a Python list."""
        return self.table[name].to_pylist()

    def rows_of_split(self, split: str) -> "np.ndarray":
        """Rows of a split [n], all rows where the data has no splits at all."""
        import numpy as np
        import pyarrow.compute as pc

        if not pc.any(pc.not_equal(self.table["split"], "")).as_py():
            return np.arange(len(self))
        return np.flatnonzero(pc.equal(self.table["split"], split).to_numpy())

    def has_text(self) -> "np.ndarray":
        """Whether each row has a text that is not empty, bool [rows]."""
        import numpy as np
        import pyarrow.compute as pc

        texts = self.table["texts"]
        filled = ~pc.match_substring_regex(pc.list_flatten(texts), rf"\A[{SPACES}]*\z").to_numpy()
        found = np.zeros(len(self), bool)
        found[pc.list_parent_indices(texts).to_numpy()[filled]] = True
        return found


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


def make_manifest(data: str, root: Any, samples: Iterable[Sample], *, limit: int | None = None) -> Manifest:
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
        raise UserError(
            f"no pictures or texts found in {data}: see `tc build --help` for the formats that are read"
        )
    table = pa.Table.from_batches(batches)
    if pc.count_distinct(table["key"]).as_py() < len(table):  # counted in Arrow: Python strings are larger
        counts = pc.value_counts(table["key"])
        key = counts.field("values")[pc.index(pc.greater(counts.field("counts"), 1), value=True).as_py()]
        raise UserError(f"key '{key}' comes twice in {data}: give every row its own key or file name")
    return Manifest(tidy(data), root, table, digest_rows(table))


def digest_rows(table: "pa.Table") -> str:
    """sha256 over every row's key, picture reference, picture size, texts and task; neither root nor order matter."""
    import numpy as np

    return hashlib.sha256(np.sort(row_digests(table)).tobytes()).hexdigest()


def row_digests(table: "pa.Table") -> "np.ndarray":
    """What `digest_rows` knows of each row: sixteen bytes, dtype S16 [rows]."""
    import numpy as np

    digests = bytearray()
    for batch in table.select(["key", "image", "offset", "size", "texts", "task"]).to_batches(
        max_chunksize=4096
    ):
        for row in batch.to_pylist():
            digests += hashlib.blake2b(repr(tuple(row.values())).encode(), digest_size=16).digest()
    return np.frombuffer(digests, "S16")


def write_manifest(manifest: Manifest, path: Any) -> None:
    """Parquet that `--data` takes; written aside and renamed, or in one request."""
    import pyarrow.parquet as pq

    meta = {"data": manifest.data, "root": str(manifest.root), "digest": manifest.digest}
    table = manifest.table.replace_schema_metadata({**meta, "checksum": _checksum(meta)})
    stream_whole(path, lambda file: pq.write_table(table, file, write_page_checksum=True))


def load_manifest(path: Any) -> Manifest:
    """The manifest that `write_manifest` wrote."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    source = io.BytesIO(path.read_bytes()) if is_url(path) else path  # a lost connection is told as that
    try:
        table = pq.read_table(source, page_checksum_verification=True)
        if "task" not in table.column_names:  # written before there were task columns
            table = table.append_column("task", pa.array([""] * len(table), pa.string()))
        missing = [name for name in schema().names if name not in table.column_names]
        meta = {key.decode(): value.decode() for key, value in (table.schema.metadata or {}).items()}
        table = table if missing else table.select(schema().names).cast(schema())
    except FileNotFoundError:
        raise
    except (pa.ArrowException, ValueError, OSError) as error:
        raise UserError(f"{path} is not a readable Parquet file: {error}") from error
    if missing or "root" not in meta:
        raise UserError(f"{path} is not a manifest (no {', '.join(missing) or 'root'})")
    known = {name: meta.get(name, "") for name in ("data", "root", "digest")}
    if meta.get("checksum", _checksum(known)) != _checksum(known):
        raise UserError(f"{path} is damaged: the checksum of where its pictures lie differs")
    return Manifest(known["data"], as_path(known["root"]), table, known["digest"])


def manifest_keys(path: Any) -> Iterator["pa.Array"]:
    """The keys of a manifest that `write_manifest` wrote, in order, some at a time: never the whole table in memory."""
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


def read_image(manifest: Manifest, sample: Sample, at_least: int = 0) -> "Image.Image":
    """The row's picture as a person sees it, RGB; BadSample with the reason where it cannot be read.

    At a URL a broken connection is a UserError, never a bad row: the build stops and can be resumed.
    """
    return decode_image(read_bytes(manifest, sample), at_least)


def read_bytes(manifest: Manifest, sample: Sample) -> bytes:
    """The bytes of a row's picture as they are stored; BadSample where there are none."""
    path = below(here(manifest.root), sample.image)
    try:
        return _content(path, sample)
    except FileNotFoundError as error:
        reason = f"there is no {path}" if is_url(path) else error.strerror or error
        raise BadSample(f"cannot open the picture: {reason}") from error
    except OSError as error:
        raise BadSample(f"cannot open the picture: {error.strerror or error}") from error
    except LookupError as error:
        raise BadSample(str(error.args[0])) from error


def _content(path: Any, sample: Sample) -> bytes:
    """The bytes of a row's picture: a whole file, a part of one, or a cell of a column."""
    if sample.offset >= 0 and path.suffix.lower() in COLUMN_FILES:
        read = functools.partial(picture_in_row, path, sample.offset)
        return persistently(read, path) if is_url(path) else read()
    if is_url(path):
        return read_range(path, sample.offset, sample.size) if sample.offset >= 0 else read_range(path)
    with open(path, "rb") as file:
        if sample.offset >= 0:
            file.seek(sample.offset)
            return file.read(sample.size)
        return file.read()


def decode_image(content: bytes, at_least: int = 0) -> "Image.Image":
    """Bytes to RGB: EXIF turned, alpha on white, 16 bit scaled, first frame; BadSample where not a picture.

    With `at_least` a larger JPEG is decoded at 1/2, 1/4 or 1/8 of its size, the smallest whose shorter side has still
    as many pixels: its decoder leaves out the finest cosines instead of computing pixels that a resize averages away.
    """
    import warnings

    from PIL import Image, ImageOps, UnidentifiedImageError

    if not content:
        raise BadSample("the picture has no bytes")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter(
                "ignore"
            )  # PIL warns of every odd tag; what cannot be read gets its reason below
            image = Image.open(io.BytesIO(content))
            if image.format == "EPS":  # PIL runs Ghostscript for it: a program, not a picture
                raise BadSample("EPS is not read")
            if image.width * image.height > MAX_PIXELS:
                raise BadSample(
                    f"{image.width} x {image.height} pixels are more than the limit of {MAX_PIXELS:,}"
                )
            if at_least > 0 and image.format in (
                "JPEG",
                "MPO",
            ):  # MPO: a phone's JPEG with a second one behind it
                # PIL takes the largest of its scales that keeps both sides above what is asked for
                image.draft(None, (at_least, at_least))
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


def seen_size(content: bytes) -> tuple[int, int]:
    """Width and height of a picture that can be decoded, as a person sees it at full size: EXIF turned, not reduced."""
    import warnings

    from PIL import ExifTags, Image

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        image = Image.open(io.BytesIO(content))
        turned = image.getexif().get(ExifTags.Base.Orientation) in (5, 6, 7, 8)
    return image.size[::-1] if turned else image.size


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
