"""An index on disk: facts beside it, whole writes, mapped reads, whether it is of this cache. Not for building one."""

import dataclasses
import json
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
    """What is written beside an index: how good it is, and of which rows of which cache."""

    field: str
    kind: str  # flat, ivf or hnsw
    asked: str  # what `--kind` was
    vectors: int
    trained: int  # vectors that there were when the lists of an IVF index were made
    bytes: int  # of the index file
    effort: Mapping[str, int]  # {"nprobe": 16}, {"efSearch": 64}; {} where search is exact
    recall_at_10: Mapping[str, float]  # by the field that the queries were from; {} where search is exact
    queries: int  # at most, from each such field
    rows: int  # of the cache, usable or not
    meta: str  # fingerprint of the whole CacheMeta: equal where nothing at all happened since
    identity: str  # fingerprint of what growing leaves as it is
    manifest: str  # digest of the first `rows` rows of the cache's manifest


def index_path(cache: store.Cache, field: str) -> Path:
    """Where the index of a field lies: beside the cache."""
    return cache.path.with_name(f"{cache.path.name.removesuffix('.zarr')}.{field}.faiss")


def record_path(path: Path) -> Path:
    """Where the facts of an index lie."""
    return path.with_name(path.name + ".json")


def identity(cache: store.Cache) -> str:
    """Fingerprint of what two sizes of one cache share: not where data lies, how much of it, or who wrote it."""
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
    """The facts beside an index; None where there are none that this version understands."""
    try:
        return IndexRecord(**json.loads(record_path(index_path(cache, field)).read_text()))
    except (FileNotFoundError, ValueError, TypeError):
        return None


def write_record(cache: store.Cache, facts: IndexRecord) -> IndexRecord:
    """IndexRecord with the fingerprint of the cache as it is now, written where they are not there already."""
    now = dataclasses.replace(facts, meta=fingerprint(cache.meta))
    if now != facts:
        write_whole(record_path(index_path(cache, facts.field)), json.dumps(dataclasses.asdict(now)) + "\n")
    return now


def status(cache: store.Cache, facts: IndexRecord) -> str:
    """Whether an index is of this cache: "current", "grown" where the cache has more rows, else "other"."""
    if facts.meta == fingerprint(cache.meta):
        return "current"
    if facts.identity != identity(cache) or facts.rows > cache.meta.rows:
        return "other"
    table = load_manifest(cache.path / "manifest.parquet").table
    if digest_rows(table.slice(0, facts.rows)) != facts.manifest:
        return "other"
    return "grown" if facts.rows < cache.meta.rows else "current"


def index_command(cache: store.Cache, field: str, facts: IndexRecord | None = None) -> str:
    """What to type to make an index of a field, of the kind that was asked for before."""
    kind = f" --kind {facts.asked}" if facts is not None and facts.asked != "auto" else ""
    return f"run `tc index {cache.path} --field {field}{kind}`"


def check_index(cache: store.Cache, field: str) -> IndexRecord:
    """The facts of the index beside a cache; UserError where it is missing or not of all of this cache."""
    path = index_path(cache, field)
    facts = read_record(cache, field)
    command = index_command(cache, field, facts)
    if not path.exists():
        raise UserError(f"no index of '{field}' yet: {command}")
    if facts is None:
        raise UserError(f"{path}.json is missing, damaged or of another version: {command}")
    state = status(cache, facts)
    if state == "grown":
        raise UserError(
            f"{path} lacks the last {cache.meta.rows - facts.rows:,} rows of this cache: {command}"
        )
    if state == "other":
        raise UserError(f"{path} was made for another build of this cache: {command}")
    return facts


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


def read_index(cache: store.Cache, facts: IndexRecord, *, write: bool = False) -> Any:
    """The index of these facts, ready to search: a local IVF index is mapped, unless it is to be added to."""
    faiss, path = faiss_module(), index_path(cache, facts.field)
    try:
        if path.stat().st_size != facts.bytes:
            raise ValueError(f"{facts.bytes:,} bytes expected")
        if is_url(path):
            with path.open("rb") as file:
                index = faiss.read_index(faiss.PyCallbackIOReader(file.read))
        else:  # mapped, a search touches nprobe lists of it and not the whole file
            index = faiss.read_index(
                str(path), faiss.IO_FLAG_MMAP if facts.kind == "ivf" and not write else 0
            )
        if index.ntotal != facts.vectors:
            raise ValueError(f"{facts.vectors:,} vectors expected, {index.ntotal:,} found")
        set_effort(index, facts.effort)
    except (RuntimeError, OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"{path} is damaged ({reason}): {index_command(cache, facts.field, facts)}"
        ) from error
    return index


def set_effort(index: Any, effort: Mapping[str, int]) -> None:
    """Set nprobe or efSearch of an index."""
    for name, value in effort.items():
        faiss_module().ParameterSpace().set_index_parameter(index, name, value)


def faiss_module() -> Any:
    """The faiss that is installed, for CPUs or GPUs; UserError where there is none."""
    try:
        import faiss
    except ImportError as error:
        raise UserError("search needs FAISS: pip install 'teachercache[cpu]' (or [gpu])") from error
    return faiss
