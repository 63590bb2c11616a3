"""Search the vectors of some rows only, with an index or exactly, and report whether the result is exact."""

import dataclasses
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int

from teachercache.cache import store
from teachercache.core.errors import UserError
from teachercache.search.index import EFFORT, open_index
from teachercache.search.index_files import faiss_module, index_command, index_path, read_record
from teachercache.search.vectors import Vectors, exact_search, unit, usable_vectors

# Of a selection that is compared exactly beside an index: converting 10,000 vectors of width 512 from half precision
# takes 25 ms
EXACT_UP_TO = 10_000


@dataclasses.dataclass(frozen=True)
class Searcher:
    """What a field of a cache is searched with.

    Attributes:
        cache: The cache.
        field: The vector field.
        vectors: Its usable vectors.
        units: The unit vectors in memory, where there is no index; they are few then.
        index: The opened index; None if the vectors are searched exactly.
        kind: The kind of the index; "" without one.
        effort: The settings of the index, such as {"nprobe": 16}; {} if it is exact.
        recall: The lowest recall@10 that was measured for the index; 1 if it is exact.
    """

    cache: store.Cache
    field: str
    vectors: Vectors
    units: Float[np.ndarray, "n dim"] | None = None
    index: Any = None
    kind: str = ""
    effort: dict[str, int] = dataclasses.field(default_factory=dict)
    recall: float = 1.0


@dataclasses.dataclass(frozen=True)
class Hits:
    """The nearest ids, best first; `exact` is False if an approximate index found them."""

    ids: Int[np.ndarray, " n"]
    scores: Float[np.ndarray, " n"]
    exact: bool


def open_searcher(cache: store.Cache, field: str) -> Searcher:
    """Open a field for many searches; raise UserError with the `tc index` command if it needs an index."""
    opened, vectors = open_index(cache, field), usable_vectors(cache, field)
    record = read_record(cache, field)
    if isinstance(opened, Vectors) or record is None:
        return Searcher(cache, field, vectors, vectors.take(vectors.ids))
    recall = min(record.recall_at_10.values(), default=1.0)
    return Searcher(cache, field, vectors, None, opened, record.kind, dict(record.effort), recall)


def search_rows(
    searcher: Searcher,
    query: Float[np.ndarray, " dim"],
    *,
    top: int,
    rows: Bool[np.ndarray, " rows"] | None = None,
) -> Hits:
    """Return the `top` nearest ids by cosine among some rows.

    Up to EXACT_UP_TO vectors are compared exactly, also beside an index: an index that reads a part of its lists would
    miss most vectors of a small selection.

    Args:
        searcher: The opened field.
        query: The query, of any length.
        top: The number of ids; there are fewer if fewer vectors are selected.
        rows: Which rows of the cache are selected; None for all.

    Raises:
        UserError: The index is damaged.
    """
    vectors, unit_query = searcher.vectors, unit(np.asarray(query)[None])
    if searcher.units is not None:
        kept = slice(None) if rows is None else rows[vectors.ids // vectors.per_row]
        cosines = (searcher.units @ unit_query[0])[kept]
        order = np.argsort(-cosines, kind="stable")[:top]
        return Hits(vectors.ids[kept][order], cosines[order], exact=True)
    ids = vectors.ids if rows is None else _selected(vectors, rows)
    top = min(top, len(ids))
    if rows is not None and len(ids) <= EXACT_UP_TO:
        scores, found = exact_search(dataclasses.replace(vectors, ids=ids), unit_query, top)
        return Hits(found[0], scores[0], exact=True)
    try:
        scores, found = _search_index(searcher, unit_query, top, None if rows is None else ids)
    except RuntimeError as error:  # of faiss
        raise _damaged(searcher, " ".join(str(error).split())[:200]) from error
    places = np.searchsorted(vectors.ids, found)
    if not np.array_equal(vectors.ids[np.minimum(places, len(vectors) - 1)], found):
        raise _damaged(searcher, "it finds rows that the cache does not have")
    return Hits(found, scores, exact=not searcher.effort)


def _selected(vectors: Vectors, rows: Bool[np.ndarray, " rows"]) -> Int[np.ndarray, " n"]:
    """Return the usable ids of some rows. Of a million rows it takes 1 ms where each has one vector, otherwise 10."""
    if vectors.per_row == 1 and len(vectors) == len(rows):
        return np.flatnonzero(rows)
    return vectors.ids[rows[vectors.ids // vectors.per_row]]


def _search_index(
    searcher: Searcher, query: Float[np.ndarray, "1 dim"], top: int, ids: Int[np.ndarray, " n"] | None
) -> tuple[np.ndarray, np.ndarray]:
    """Search with the effort of the index, and twice as much as long as fewer than `top` ids are found."""
    faiss = faiss_module()
    selector = None
    if ids is not None:
        selected = np.zeros(-(-(int(ids[-1]) + 1) // 8) * 8, bool)
        selected[ids] = True
        bits = np.packbits(selected, bitorder="little")
        selector = faiss.IDSelectorBitmap(bits)
    most = {"ivf": getattr(searcher.index, "nlist", 0)}.get(searcher.kind, searcher.index.ntotal)
    effort = next(iter(searcher.effort.values()), most)
    while True:
        parameters = _parameters(faiss, searcher.kind, min(effort, most), selector)
        scores, found = searcher.index.search(query, top, params=parameters)
        kept = found[0] >= 0
        if kept.sum() == top or effort >= most:
            return scores[0][kept], found[0][kept]
        effort *= 2


def _parameters(faiss: Any, kind: str, effort: int, selector: Any) -> Any:
    """Return the parameters of one search."""
    made = {
        "ivf": faiss.SearchParametersIVF,
        "hnsw": faiss.SearchParametersHNSW,
        "flat": faiss.SearchParameters,
    }[kind]
    settings = {EFFORT[kind]: effort} if kind in EFFORT else {}
    return made(**settings, **({} if selector is None else {"sel": selector}))


def _damaged(searcher: Searcher, reason: str) -> UserError:
    cache, field = searcher.cache, searcher.field
    command = index_command(cache, field, read_record(cache, field))
    return UserError(f"{index_path(cache, field)} is damaged ({reason}): {command}")
