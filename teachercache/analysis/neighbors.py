"""Nearest neighbors, duplicates and outliers: exact, in memory that does not grow with the number of rows.

Every function takes an array [n, dim] or the Vectors of a cache, and returns positions 0 .. n-1 in it.
"""

import hashlib
from collections.abc import Iterator, Sequence

import numpy as np
from jaxtyping import Float, Int

from teachercache.search.vectors import Vectors, exact_search, unit

BLOCK_SCORES = 1 << 25  # cosines in memory at once
Rows = np.ndarray | Vectors


def as_vectors(rows: Rows) -> Vectors:
    """Wrap the rows of an array as Vectors; return Vectors unchanged."""
    return rows if isinstance(rows, Vectors) else Vectors(np.asarray(rows), np.arange(len(rows)), 1)


def parts(rows: Rows, size: int = 8192) -> Iterator[tuple[int, Float[np.ndarray, "n dim"]]]:
    """Yield the first position and the unit vectors of `size` rows at a time."""
    vectors = as_vectors(rows)
    for first in range(0, len(vectors), size):
        yield first, vectors.take(vectors.ids[first : first + size])


def take(rows: Rows, at: Int[np.ndarray, " q"]) -> Float[np.ndarray, "q dim"]:
    """Return the unit vectors at some positions."""
    vectors = as_vectors(rows)
    return vectors.take(vectors.ids[at])


def nearest(
    rows: Rows, k: int, at: Int[np.ndarray, " q"] | None = None
) -> tuple[Float[np.ndarray, "q k"], Int[np.ndarray, "q k"]]:
    """Return cosines and positions of the k nearest other rows, best first, of the rows at some positions
    (default: all).
    """
    vectors = as_vectors(rows)
    at = np.arange(len(vectors)) if at is None else at
    scores, ids = exact_search(vectors, take(vectors, at), min(k + 1, len(vectors)))
    neighbors_at = positions(vectors.ids, ids)
    others = np.argsort(neighbors_at == at[:, None], axis=1, kind="stable")[:, : min(k, len(vectors) - 1)]
    return np.take_along_axis(scores, others, 1), np.take_along_axis(neighbors_at, others, 1)


def positions(ids: Int[np.ndarray, " n"], wanted: Int[np.ndarray, "..."]) -> Int[np.ndarray, "..."]:
    """Return the position of each id in `ids`, which need not be sorted."""
    order = np.argsort(ids, kind="stable")
    return order[np.searchsorted(ids[order], wanted)]


# ----------------------------------------------------------------------------------------------------
# Duplicates


def near_pairs(
    rows: Rows, threshold: float, at: Int[np.ndarray, " q"] | None = None, *, limit: int = 100_000
) -> tuple[Int[np.ndarray, "pairs 2"], Float[np.ndarray, " pairs"], int]:
    """Return pairs i < j with a cosine of at least `threshold`, their cosines, and their number, most similar
    first.

    Args:
        rows: The rows.
        threshold: The least cosine.
        at: The positions to compare with every row; all by default.
        limit: The number of pairs to keep, those with the highest cosines.
    """
    vectors = as_vectors(rows)
    whole = at is None
    at = np.arange(len(vectors)) if at is None else np.sort(at)
    asked = np.zeros(len(vectors), bool)
    asked[at] = True
    pairs, cosines, count = np.empty((0, 2), np.int64), np.empty(0, np.float32), 0
    for first, chunk in parts(vectors):
        size = max(1, BLOCK_SCORES // len(chunk))
        for start in range(0, len(at), size):
            block = at[start : start + size]
            if whole and block[0] >= first + len(chunk):
                break  # each pair is visited once, from its first row
            scores = take(vectors, block) @ chunk.T
            i, j = np.nonzero(scores >= threshold)
            left, right = block[i], first + j
            kept = (left < right) | ((left > right) & ~asked[right])
            count += int(kept.sum())
            pairs = np.concatenate([pairs, np.stack([left, right], 1)[kept]])
            cosines = np.concatenate([cosines, scores[i, j][kept]])
            if len(pairs) > limit:
                best = np.argsort(-cosines, kind="stable")[:limit]
                pairs, cosines = pairs[best], cosines[best]
    order = np.lexsort((*np.sort(pairs, 1).T[::-1], -cosines))
    return np.sort(pairs, 1)[order], cosines[order], count


def exact_groups(rows: Rows) -> list[list[int]]:
    """Return groups of two or more positions with identical vectors, in the order of their first position."""
    vectors = as_vectors(rows)
    digests = np.empty(len(vectors), np.uint64)
    for first in range(0, len(vectors), 8192):
        stored = _stored(vectors, vectors.ids[first : first + 8192])
        for i, row in enumerate(stored):
            digests[first + i] = int.from_bytes(
                hashlib.blake2b(row.tobytes(), digest_size=8).digest(), "little"
            )
    order = np.argsort(digests, kind="stable")
    edges = np.flatnonzero(np.diff(digests[order])) + 1
    return sorted(group.tolist() for group in np.split(order, edges) if len(group) > 1)


def _stored(vectors: Vectors, ids: np.ndarray) -> np.ndarray:
    return vectors.stored[np.divmod(ids, vectors.per_row)] if vectors.texts else vectors.stored[ids]


def grouped(pairs: Int[np.ndarray, "pairs 2"] | Sequence[Sequence[int]]) -> list[list[int]]:
    """Join pairs that share a row into groups, each sorted, in the order of their first pair."""
    parent: dict[int, int] = {}

    def root(i: int) -> int:
        while parent.setdefault(i, i) != i:
            parent[i] = parent[parent[i]]
            i = parent[i]
        return i

    for i, j in np.asarray(pairs).reshape(-1, 2).tolist():
        a, b = root(i), root(j)
        parent[max(a, b)] = min(a, b)
    groups: dict[int, list[int]] = {}
    for i in parent:  # in the order of the pairs
        groups.setdefault(root(i), []).append(i)
    return [sorted(group) for group in groups.values()]


# ----------------------------------------------------------------------------------------------------
# Outliers


def outlier_scores(cosines: Float[np.ndarray, "q k"]) -> Float[np.ndarray, " q"]:
    """Return 1 - the mean cosine to the k nearest neighbors."""
    return 1 - cosines.mean(1)


def far_from_centers(
    rows: Rows, centers: Float[np.ndarray, "c dim"]
) -> tuple[Int[np.ndarray, " n"], Float[np.ndarray, " n"]]:
    """Return the nearest centroid of each row, and 1 - the cosine to it."""
    vectors, towards = as_vectors(rows), unit(centers)
    number, distance = np.empty(len(vectors), np.int32), np.empty(len(vectors), np.float32)
    for first, chunk in parts(vectors):
        scores = chunk @ towards.T
        number[first : first + len(chunk)] = scores.argmax(1)
        distance[first : first + len(chunk)] = 1 - scores.max(1)
    return number, distance
