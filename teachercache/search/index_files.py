"""Index files: the record beside an index, atomic writes, memory-mapped reads, and whether it belongs to a
cache.

The record holds the checksum of its index. While an index is replaced, the record file holds the new record and the
one before: whenever the process is killed, one of them fits the index that is there.
"""

import dataclasses
import json
import shlex
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import google_crc32c

from teachercache.cache import store
from teachercache.cache.spec import fingerprint
from teachercache.core.errors import UserError, is_machine
from teachercache.core.paths import is_url, stream_whole, write_whole
from teachercache.data.manifest import digest_rows, load_manifest

if TYPE_CHECKING:
    import faiss


@dataclasses.dataclass(frozen=True)
class IndexRecord:
    """The JSON record beside an index: its quality, and the rows of the cache that it covers.

    Attributes:
        field: The vector field.
        kind: flat, ivf or hnsw.
        asked: The value of `--kind`.
        vectors: The number of vectors.
        trained: The number of vectors when the lists of an IVF index were trained.
        bytes: The size of the index file.
        effort: {"nprobe": 16} or {"efSearch": 64}; {} for exact search.
        recall_at_10: The recall by the field of the queries; {} for exact search.
        queries: The largest number of queries per field.
        rows: The number of rows of the cache, usable or not.
        meta: The fingerprint of the CacheMeta.
        identity: The fingerprint of what does not change when a cache grows.
        manifest: The digest of the first `rows` rows of the manifest of the cache.
        checksum: The crc32c of the index file; -1 in a record of an earlier version.
        head: The bytes before the contents of the lists of an IVF index; all bytes of another index.
        head_checksum: The crc32c of these bytes.
        digest: The fingerprint of the other attributes.
    """

    field: str
    kind: str
    asked: str
    vectors: int
    trained: int
    bytes: int
    effort: Mapping[str, int]
    recall_at_10: Mapping[str, float]
    queries: int
    rows: int
    meta: str
    identity: str
    manifest: str
    checksum: int = -1
    head: int = 0
    head_checksum: int = -1
    digest: str = ""


WHOLE_UP_TO = (
    256 << 20
)  # bytes of a memory-mapped index that are checked before each search (0.1 s); of a larger
# one the head is, a flipped bit in its lists is found by `tc verify`


def index_path(cache: store.Cache, field: str) -> Path:
    """Return the path of the index of a field: beside the cache."""
    return cache.path.with_name(f"{cache.path.name.removesuffix('.zarr')}.{field}.faiss")


def record_path(path: Path) -> Path:
    """Return the path of the record of an index."""
    return path.with_name(path.name + ".json")


def identity(cache: store.Cache) -> str:
    """Return the fingerprint of what a cache keeps when it grows: not its data path, its size or its
    versions.
    """
    rest: dict[str, Any] = {
        "data": "",
        "manifest": "",
        "rows": 0,
        "limit": 0,
        "block_rows": 1,
        "versions": {},
    }
    return fingerprint(dataclasses.replace(cache.meta, **rest))


def read_record(cache: store.Cache, field: str) -> IndexRecord | None:
    """Return the record of an index, or None if there is none of this version, or if it is damaged."""
    path = index_path(cache, field)
    try:
        values = json.loads(record_path(path).read_bytes())
        if "before" not in values:
            return _record(values)
        before = values.pop("before")  # a command was killed while it replaced the index
        records = [_record(found) for found in (values, before) if found]
    except (FileNotFoundError, ValueError, TypeError, AttributeError, RecursionError):
        return None
    return next((record for record in records if not wrong_bytes(path, record, whole=True)), None)


def _record(values: dict[str, Any]) -> IndexRecord:
    """Return a record; raise ValueError if its own digest differs."""
    record = IndexRecord(**values)
    if record.digest and record.digest != _digest(record):
        raise ValueError("the record is damaged")
    return record


def _digest(record: IndexRecord) -> str:
    return fingerprint(dataclasses.replace(record, digest=""))


def is_unfinished(path: Path) -> bool:
    """Return whether a command was killed before it wrote the first index at a path."""
    try:
        return not path.exists() and json.loads(record_path(path).read_bytes())["before"] is None
    except (OSError, ValueError, TypeError, KeyError):
        return False


def write_record(
    cache: store.Cache, record: IndexRecord, *, before: IndexRecord | None = None, replacing: bool = False
) -> IndexRecord:
    """Update the fingerprints of a record, and write it unless the file holds it alone already.

    Args:
        cache: The cache.
        record: The record.
        before: The record of the index that is there.
        replacing: Keep `before` in the file, as the index is still the one before.
    """
    now = dataclasses.replace(record, meta=fingerprint(cache.meta))
    now = dataclasses.replace(now, digest=_digest(now))
    more = {"before": before and dataclasses.asdict(before)} if replacing else {}
    content = json.dumps(dataclasses.asdict(now) | more).encode() + b"\n"
    path = record_path(index_path(cache, record.field))
    if not path.exists() or path.read_bytes() != content:  # it may also hold the record before
        write_whole(path, content)
    return now


def kind_of_file(path: Path) -> str:
    """Return the kind of an index whose record is lost, by the names that faiss writes at its start."""
    with path.open("rb") as file:
        start = file.read(256)
    return "hnsw" if b"IHN" in start else "ivf" if start.startswith(b"Iw") else "auto"


def status(cache: store.Cache, record: IndexRecord) -> str:
    """Return "current", "grown" if the cache has more rows than the index, or "other" if it is not of this
    cache.
    """
    if record.meta == fingerprint(cache.meta):
        return "current"
    if record.identity != identity(cache) or record.rows > cache.meta.rows:
        return "other"
    table = load_manifest(cache.path / "manifest.parquet").table
    if digest_rows(table.slice(0, record.rows)) != record.manifest:
        return "other"
    return "grown" if record.rows < cache.meta.rows else "current"


def index_command(cache: store.Cache, field: str, record: IndexRecord | None = None) -> str:
    """Return the command that builds the index of a field, of the same kind as before."""
    kind = ["--kind", record.asked] if record is not None and record.asked != "auto" else []
    return f"run `{shlex.join(['tc', 'index', str(cache.path), '--field', field, *kind])}`"


def check_index(cache: store.Cache, field: str) -> IndexRecord:
    """Return the record of an index; raise UserError if it is missing or does not cover the whole cache."""
    path = index_path(cache, field)
    record = read_record(cache, field)
    command = index_command(cache, field, record)
    if not path.exists():
        raise UserError(f"no index of '{field}' yet: {command}")
    if record is None:
        raise UserError(f"{path}.json is missing, damaged or of another version: {command}")
    state = status(cache, record)
    if state == "grown":
        raise UserError(
            f"{path} lacks the last {cache.meta.rows - record.rows:,} rows of this cache: {command}"
        )
    if state == "other":
        raise UserError(f"{path} was made for another build of this cache: {command}")
    return record


def write_index(index: "faiss.Index", path: Path) -> int:
    """Write an index atomically and without a second copy in memory; return its bytes."""
    _write_file(path, lambda file: _stream(index, file))
    return path.stat().st_size


def replace_index(cache: store.Cache, index: "faiss.Index", record: IndexRecord) -> IndexRecord:
    """Write an index and its record, which gains its size and checksums. A kill leaves the old pair or the new one."""
    path = index_path(cache, record.field)
    before = read_record(cache, record.field) if path.exists() else None
    made = [record]

    def write(file: IO[bytes]) -> None:
        sums = _stream(index, file)
        size, checksum = sums[-1]
        # Behind the head lie a code in half precision and an id for each vector
        lists = index.ntotal * (2 * index.d + 8) if record.kind == "ivf" else 0
        head, head_checksum = next(pair for pair in reversed(sums) if pair[0] <= size - lists)
        new = dataclasses.replace(
            record, bytes=size, checksum=checksum, head=head, head_checksum=head_checksum
        )
        made[0] = write_record(cache, new, before=before, replacing=True)

    _write_file(path, write)
    return write_record(cache, made[0])


def _write_file(path: Path, write: Callable[[IO[bytes]], Any]) -> None:
    if is_url(path):  # streamed: the upload appears when it is closed
        with path.open("wb") as file:
            write(file)
    else:
        stream_whole(path, write)


def _stream(index: "faiss.Index", file: IO[bytes]) -> list[tuple[int, int]]:
    """Write an index into an open file; return the bytes so far and their crc32c after each part, from (0, 0) on."""
    module, sums = faiss_module(), [(0, 0)]

    def write(content: bytes) -> int:
        written = file.write(content)
        size, checksum = sums[-1]
        sums.append((size + len(content), google_crc32c.extend(checksum, bytes(content))))
        return written

    module.write_index(index, module.PyCallbackIOWriter(write))
    return sums


def wrong_bytes(path: Path, record: IndexRecord, *, whole: bool) -> str:
    """Return what is wrong with the bytes of an index file, or an empty string.

    Args:
        path: The index.
        record: Its record; one of an earlier version has no checksum, then the size alone is compared.
        whole: Read all bytes, also of a large index that is searched on the disk.
    """
    if not path.exists():
        return "is missing"
    size = path.stat().st_size
    if size != record.bytes:
        return f"{record.bytes:,} bytes expected, {size:,} found"
    if record.checksum < 0:
        return ""
    all_bytes = whole or size <= WHOLE_UP_TO
    left, expected = (size, record.checksum) if all_bytes else (record.head, record.head_checksum)
    checksum = 0
    with path.open("rb") as file:
        while left > 0 and (part := file.read(min(left, 1 << 24))):
            checksum, left = google_crc32c.extend(checksum, part), left - len(part)
    return "" if (left, checksum) == (0, expected) else "its checksum differs"


def read_index(cache: store.Cache, record: IndexRecord, *, write: bool = False, whole: bool = False) -> Any:
    """Read an index whose bytes are those that were written.

    Args:
        cache: The cache.
        record: The record of the index.
        write: The index is going to be extended; otherwise a local IVF index is memory-mapped.
        whole: Check all bytes, also of a large memory-mapped index.
    """
    faiss, path = faiss_module(), index_path(cache, record.field)
    mapped = record.kind == "ivf" and not write and not is_url(path)
    try:
        wrong = wrong_bytes(path, record, whole=whole or not mapped)
        if wrong:
            raise ValueError(wrong)
        if is_url(path):
            with path.open("rb") as file:
                index = faiss.read_index(faiss.PyCallbackIOReader(file.read))
        else:  # a search of a mapped index reads nprobe lists only
            index = faiss.read_index(str(path), faiss.IO_FLAG_MMAP if mapped else 0)
        if index.ntotal != record.vectors:
            raise ValueError(f"{record.vectors:,} vectors expected, {index.ntotal:,} found")
        set_effort(index, record.effort)
    except (RuntimeError, OSError, ValueError) as error:
        if is_machine(error):
            raise
        raise damaged(cache, record, " ".join(str(error).split())[:200]) from error
    return index


def damaged(cache: store.Cache, record: IndexRecord, reason: str) -> UserError:
    """Return the error about a damaged index, with the command that makes it again."""
    path = index_path(cache, record.field)
    return UserError(f"{path} is damaged ({reason}): {index_command(cache, record.field, record)}")


def set_effort(index: Any, effort: Mapping[str, int]) -> None:
    """Set nprobe or efSearch of an index."""
    for name, value in effort.items():
        faiss_module().ParameterSpace().set_index_parameter(index, name, value)


def faiss_module() -> Any:
    """Import the installed faiss, for CPUs or GPUs; raise UserError if there is none."""
    try:
        import faiss
    except ImportError as error:
        raise UserError("search needs FAISS: pip install 'teachercache[cpu]' (or [gpu])") from error
    return faiss
