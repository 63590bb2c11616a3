"""Index files: the record beside an index, atomic writes, memory-mapped reads, and whether it belongs to a
cache.
"""

import dataclasses
import json
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from teachercache.cache import store
from teachercache.cache.spec import fingerprint
from teachercache.core.errors import UserError
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
    """Return the record of an index, or None if there is none of this version."""
    try:
        return IndexRecord(**json.loads(record_path(index_path(cache, field)).read_text()))
    except (FileNotFoundError, ValueError, TypeError):
        return None


def write_record(cache: store.Cache, record: IndexRecord) -> IndexRecord:
    """Update the fingerprint of a record and write it if it changed."""
    now = dataclasses.replace(record, meta=fingerprint(cache.meta))
    if now != record:
        write_whole(record_path(index_path(cache, record.field)), json.dumps(dataclasses.asdict(now)) + "\n")
    return now


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

    def write(file: IO[bytes]) -> None:
        module.write_index(index, module.PyCallbackIOWriter(file.write))

    module = faiss_module()
    if is_url(path):  # streamed: the upload appears when it is closed
        with path.open("wb") as file:
            write(file)
    else:
        stream_whole(path, write)
    return path.stat().st_size


def read_index(cache: store.Cache, record: IndexRecord, *, write: bool = False) -> Any:
    """Read an index; a local IVF index is memory-mapped unless it is going to be extended (`write`)."""
    faiss, path = faiss_module(), index_path(cache, record.field)
    try:
        if path.stat().st_size != record.bytes:
            raise ValueError(f"{record.bytes:,} bytes expected")
        if is_url(path):
            with path.open("rb") as file:
                index = faiss.read_index(faiss.PyCallbackIOReader(file.read))
        else:  # a search of a mapped index reads nprobe lists only
            index = faiss.read_index(
                str(path), faiss.IO_FLAG_MMAP if record.kind == "ivf" and not write else 0
            )
        if index.ntotal != record.vectors:
            raise ValueError(f"{record.vectors:,} vectors expected, {index.ntotal:,} found")
        set_effort(index, record.effort)
    except (RuntimeError, OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"{path} is damaged ({reason}): {index_command(cache, record.field, record)}"
        ) from error
    return index


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
