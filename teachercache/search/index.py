"""FAISS indexes beside a cache: build, extend, measure the recall, search.

Ids are row numbers of the cache (row * texts + k for texts), so that they stay valid when the cache grows.
Unusable rows are left out. A row with several stored views has one vector, the normalized mean of its
normalized views.
"""

import contextlib
import os
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from teachercache.cache import store
from teachercache.cache.locks import LOCK
from teachercache.core import progress
from teachercache.core.errors import UserError, closest
from teachercache.core.leftovers import sweep_beside
from teachercache.core.paths import is_url
from teachercache.core.progress import say
from teachercache.search.index_files import (
    IndexRecord,
    check_index,
    faiss_module,
    identity,
    index_path,
    kind_of_file,
    read_index,
    read_record,
    replace_index,
    set_effort,
    status,
    write_record,
)
from teachercache.search.vectors import (
    Vectors,
    chunks,
    exact_search,
    unit,
    usable_vectors,
    vector_field,
    vector_fields,
)

KINDS = ("auto", "flat", "ivf", "hnsw")
FLAT_UP_TO = 50_000  # above it exact search is slower than a few hundred queries per second
EFFORT = {"ivf": "nprobe", "hnsw": "efSearch"}  # the setting that is raised until the recall is reached
LEAST_EFFORT = {"ivf": 4, "hnsw": 16}
RECALL, NEIGHBORS, QUERIES = 0.95, 10, 200
POINTS_PER_LIST = 64  # training points; faiss warns below 39
MAX_GROWTH = (
    4  # an IVF index is rebuilt when it has this many times the vectors that its lists were trained for
)


def describe(record: IndexRecord) -> str:
    """Return one line about an index: the number of vectors and the recall."""
    start = f"{record.vectors:,} vectors, {record.kind}"
    if not record.effort:
        return f"{start}, exact"
    effort = ", ".join(f"{name} {value}" for name, value in record.effort.items())
    recall = " and ".join(
        f"{value:.3f} for queries from {name}" for name, value in record.recall_at_10.items()
    )
    return (
        f"{start}, {effort}: recall@{NEIGHBORS} {recall}, against exact search on {record.queries:,} vectors"
    )


# ----------------------------------------------------------------------------------------------------
# Build and extend


def update_index(
    cache: store.Cache, *, field: str | None = None, kind: str = "auto"
) -> tuple[Path, IndexRecord, str]:
    """Bring the index of a vector field up to date with its cache.

    Args:
        cache: The cache.
        field: The vector field; None for `default_field`.
        kind: auto, flat, ivf or hnsw.

    Returns:
        The path of the index, its record, and "current", "extended" or "built".
    """
    field = vector_field(cache, field)
    path, record = index_path(cache, field), read_record(cache, field)
    sweep_beside(path)
    state = status(cache, record) if record is not None and record.asked == kind else "other"
    if record is not None and state != "other":
        with contextlib.suppress(UserError):  # damaged: rebuild it
            index = read_index(cache, record, write=state == "grown", whole=True)
            # A retry of unusable rows adds vectors to a cache whose metadata stays the same
            if state == "current" and record.vectors == len(usable_vectors(cache, field)):
                return path, write_record(cache, record), state
            extended = _extend(cache, index, record)
            if extended is not None:
                return path, extended, "extended"
    return *build_index(cache, field=field, kind=kind), "built"


def changing(cache: store.Cache) -> contextlib.AbstractContextManager[None]:
    """Let one command at a time change the indexes of a cache. One that can only be read has no lock."""
    if not is_url(cache.path) and not os.access(cache.path / LOCK, os.W_OK):
        return contextlib.nullcontext()
    return store.growing(cache)


def extend_indexes(cache: store.Cache) -> list[Path]:
    """Extend every index beside a cache to its rows, print what was done, and return the changed indexes.

    `tc build` calls it on rank 0 when the cache is complete; problems are printed, not raised.
    """
    changed = []
    for field in vector_fields(cache):
        path = index_path(cache, field)
        if not path.exists():
            continue
        old = read_record(cache, field)
        try:
            kind = old.asked if old else kind_of_file(path)
            _, record, done = update_index(cache, field=field, kind=kind)
        except UserError as error:
            say(f"{path} was not changed: {error}")
            continue
        if done != "current":
            more = f" by {record.vectors - old.vectors:,}" if old and done == "extended" else ""
            say(f"{path} {done}{more}: {describe(record)}")
            changed.append(path)
    return changed


def build_index(
    cache: store.Cache, *, field: str | None = None, kind: str = "auto"
) -> tuple[Path, IndexRecord]:
    """Build the index of a vector field, over inner products of unit vectors; see `update_index`."""
    field = vector_field(cache, field)
    faiss = faiss_module()
    if kind not in KINDS:
        raise UserError(f"--kind {kind}: {closest(kind, KINDS)}choose from {', '.join(KINDS)}")
    vectors = usable_vectors(cache, field)
    if not len(vectors):
        raise UserError(f"no usable row in {cache.path}: see {cache.path / 'quarantine.jsonl'}")
    chosen = _pick(len(vectors)) if kind == "auto" else kind
    with progress.status(f"building an index ({chosen}) of {len(vectors):,} vectors"):
        index = _empty(faiss, vectors, chosen)
        _add(faiss, index, vectors)
        record = _finish(cache, index, vectors, field=field, kind=chosen, asked=kind, trained=len(vectors))
    return index_path(cache, field), record


def _pick(num_vectors: int) -> str:
    """Return the kind for `auto`. HNSW is never chosen: for 100,000 x 512 it took 25 s and 130 MB, IVF 6 s
    and 104 MB.
    """
    return "flat" if num_vectors <= FLAT_UP_TO else "ivf"


def _empty(faiss: Any, vectors: Vectors, kind: str) -> Any:
    """Return a trained index without vectors. Its coarse centroids are trained on GPUs if faiss has them."""
    lists = max(1, min(int(2 * np.sqrt(len(vectors))), len(vectors) // 39, 1 << 14))
    factory = {"flat": "IDMap,Flat", "ivf": f"IVF{lists},SQfp16", "hnsw": "IDMap,HNSW32_SQfp16"}[kind]
    index = faiss.index_factory(vectors.dim, factory, faiss.METRIC_INNER_PRODUCT)
    if kind != "ivf":
        return index
    size = min(len(vectors), POINTS_PER_LIST * lists)
    sample = np.sort(np.random.default_rng(0).choice(vectors.ids, size, replace=False, shuffle=False))
    if faiss.get_num_gpus():
        index.clustering_index = faiss.index_cpu_to_all_gpus(faiss.IndexFlatIP(vectors.dim))
    index.train(vectors.take(sample))
    index.clustering_index = None
    return index


def _add(faiss: Any, index: Any, vectors: Vectors, *, start: int = 0) -> None:
    """Add unit vectors chunk by chunk, from the `start`-th usable one on.

    If faiss has GPUs, they assign vectors to lists; the lists stay in main memory.
    """
    coarse = getattr(index, "quantizer", None)
    if coarse is not None and faiss.get_num_gpus():
        index.quantizer = faiss.index_cpu_to_all_gpus(coarse)
    for ids, chunk in chunks(vectors, start=start):
        index.add_with_ids(chunk, ids)
    if coarse is not None:
        index.quantizer = coarse


def _extend(cache: store.Cache, index: Any, old: IndexRecord) -> IndexRecord | None:
    """Add the rows that a cache gained, or return None if the index should be built again."""
    vectors = usable_vectors(cache, old.field)
    start = int(np.searchsorted(vectors.ids, old.rows * vectors.per_row))
    if start != old.vectors:  # an old row was repaired or quarantined since
        return None
    if old.asked == "auto" and _pick(len(vectors)) != old.kind:
        return None
    if old.kind == "ivf" and len(vectors) > MAX_GROWTH * old.trained:
        return None
    _add(faiss_module(), index, vectors, start=start)
    return _finish(
        cache, index, vectors, field=old.field, kind=old.kind, asked=old.asked, trained=old.trained
    )


def _finish(
    cache: store.Cache, index: Any, vectors: Vectors, *, field: str, kind: str, asked: str, trained: int
) -> IndexRecord:
    """Measure a filled index, and write it and its record."""
    effort, recall = _tune(cache, index, vectors, field=field, kind=kind)
    record = IndexRecord(
        field=field,
        kind=kind,
        asked=asked,
        vectors=len(vectors),
        trained=trained,
        bytes=0,
        effort=effort,
        recall_at_10=recall,
        queries=min(QUERIES, len(vectors)) if effort else 0,
        rows=cache.meta.rows,
        meta="",
        identity=identity(cache),
        manifest=cache.meta.manifest,
    )
    return replace_index(cache, index, record)


# ----------------------------------------------------------------------------------------------------
# Measure


def _tune(
    cache: store.Cache, index: Any, vectors: Vectors, *, field: str, kind: str
) -> tuple[dict[str, int], dict[str, float]]:
    """Double nprobe or efSearch until the recall@10 is high enough. The index keeps the final value."""
    if kind == "flat":
        return {}, {}
    samples = _sample(cache, vectors, field)
    queries = np.concatenate([sample for sample, _ in samples.values()])
    own_ids = np.concatenate([ids for _, ids in samples.values()])
    keep = min(NEIGHBORS, len(vectors) - 1)
    scores, ids = exact_search(vectors, queries, keep + 1)
    least_scores = np.take_along_axis(scores, _others(ids, own_ids, keep), 1).min(
        axis=1, keepdims=True, initial=1
    )
    most = index.nlist if kind == "ivf" else len(vectors)
    effort = min(LEAST_EFFORT[kind], most)
    while True:
        set_effort(index, {EFFORT[kind]: effort})
        hits = _hits(index, vectors, queries, own_ids, keep, least_scores)
        ends = np.cumsum([len(sample) for sample, _ in samples.values()])[:-1]
        recall = {name: float(part.mean()) for name, part in zip(samples, np.split(hits, ends), strict=True)}
        if min(recall.values()) >= RECALL or effort >= most:
            return {EFFORT[kind]: effort}, {name: round(value, 4) for name, value in recall.items()}
        effort = min(2 * effort, most)


def _sample(cache: store.Cache, vectors: Vectors, field: str) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Return queries [q, dim] by field, each with its own id to leave out (-1: none).

    Users search images by texts, and texts lie apart from images (the modality gap of CLIP), where lists are
    cut differently. So queries are also drawn from the other modality if the cache has it.
    """
    image_vector, text_vector = cache.meta.spec.image_vector, cache.meta.spec.text_vector
    other = {image_vector: text_vector, text_vector: image_vector}.get(field, "")
    sources = {field: vectors}
    if other in cache.fields and cache.fields[other].shape == (vectors.dim,):
        sources[other] = usable_vectors(cache, other)
    random = np.random.default_rng(0)
    samples = {}
    for name, source in sources.items():
        ids = np.sort(random.choice(source.ids, min(QUERIES, len(source)), replace=False))
        samples[name] = source.take(ids), ids if name == field else np.full(len(ids), -1)
    return {name: sample for name, sample in samples.items() if len(sample[0])}


def _others(ids: np.ndarray, own_ids: np.ndarray, keep: int) -> np.ndarray:
    """Return the columns [q, keep] of the first ids that are not the query's own id."""
    return np.argsort(ids == own_ids[:, None], axis=1, kind="stable")[:, :keep]


def _hits(
    index: Any,
    vectors: Vectors,
    queries: np.ndarray,
    own_ids: np.ndarray,
    keep: int,
    least_scores: np.ndarray,
) -> np.ndarray:
    """Return the share of neighbors that are as near as the last exact one [q]: ties count as hits."""
    if not keep:
        return np.ones(len(queries))
    _, ids = index.search(queries, keep + 1)
    ids = np.take_along_axis(ids, _others(ids, own_ids, keep), 1)
    near = vectors.take(np.maximum(ids, 0).reshape(-1)).reshape(*ids.shape, -1)
    scores = np.einsum("qd,qkd->qk", queries, near)
    return ((scores >= least_scores - 1e-6) & (ids >= 0)).mean(axis=1)


# ----------------------------------------------------------------------------------------------------
# Search


def open_index(cache: store.Cache, field: str) -> Any:
    """Open the index of a field. Without a usable index, return the Vectors for exact search if they are few.

    Raises:
        UserError: There are too many vectors for exact search.
    """
    try:
        record = check_index(cache, field)
        return read_index(cache, record)
    except UserError as error:
        vectors = usable_vectors(cache, field)
        if len(vectors) > FLAT_UP_TO:
            raise
        if index_path(cache, field).exists():
            say(f"searching without the index: {error}")
        return vectors


def search(opened: Any, query: Float[np.ndarray, " dim"], *, top: int = 10) -> list[tuple[int, float]]:
    """Return the `top` nearest ids by cosine, best first, in an index that `open_index` returned."""
    unit_query = unit(np.asarray(query)[None])
    if isinstance(opened, Vectors):
        scores, ids = exact_search(opened, unit_query, top)
    else:
        scores, ids = opened.search(unit_query, min(top, opened.ntotal))
    return [(int(i), float(score)) for i, score in zip(ids[0], scores[0], strict=True) if i >= 0]
