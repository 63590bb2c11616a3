"""Compare two caches over the same rows, joined by key: what the second preserves of the first."""

import dataclasses
from collections.abc import Iterator
from typing import Any

import numpy as np

from teachercache.analysis import matching, measures, neighbors
from teachercache.analysis.report.opened import Subject, asked, draw, rows_of
from teachercache.cache import store
from teachercache.core.errors import UserError
from teachercache.search.vectors import Vectors

AT = (1, 5, 10, 50)  # the k of the overlap @k
CHANGED_AT, FOUND_AT = 10, 10
SHOWN_NEIGHBORS, LISTED = 6, 50
RANKED = 1500  # rows whose pairs are ranked


@dataclasses.dataclass(frozen=True)
class Pair:
    """The vectors of two caches at the same rows, in the order of the first."""

    first: Vectors
    second: Vectors
    owner: np.ndarray  # the row of each vector in the first cache

    def __len__(self) -> int:
        return len(self.owner)

    def parts(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yield the unit vectors of both, some rows at a time."""
        for (_, x), (_, y) in zip(neighbors.parts(self.first), neighbors.parts(self.second), strict=True):
            yield x, y


@dataclasses.dataclass(frozen=True)
class Joined:
    """The images of both caches, the texts that are equal in both (None: too few), and numbers of rows."""

    pictures: Pair | None
    texts: Pair | None
    counts: dict[str, int]


def join(first: Subject, second: Subject) -> Joined:
    """Join two caches by key; raise UserError if they have no key in common."""
    at = store.join(second.cache, first.manifest.table["key"])
    rows = {
        "both": int((at >= 0).sum()),
        "first_alone": int((at < 0).sum()),
        "second_alone": len(second.manifest) - int((at >= 0).sum()),
    }
    if not rows["both"]:
        raise UserError(
            f"{first.cache.path} and {second.cache.path} have no key in common: build both from the same --data"
        )
    pictures, texts = None, None
    if first.pictures is not None and second.pictures is not None:
        mine = rows_of(first.pictures)
        kept = np.isin(at[mine], rows_of(second.pictures))
        pictures = _pair(first.pictures, second.pictures, mine[kept], at[mine[kept]], mine[kept])
    if first.texts is not None and second.texts is not None:
        mine, number = np.divmod(first.texts.ids, first.texts.per_row)
        theirs = at[mine] * second.texts.per_row + number
        kept = (at[mine] >= 0) & (number < second.texts.per_row) & np.isin(theirs, second.texts.ids)
        kept[kept] = _same_texts(first, second, mine[kept], at[mine[kept]], number[kept])
        texts = _pair(first.texts, second.texts, first.texts.ids[kept], theirs[kept], mine[kept])
    return Joined(pictures, texts, rows)


def _pair(
    first: Vectors, second: Vectors, ids: np.ndarray, other: np.ndarray, owner: np.ndarray
) -> Pair | None:
    """Return the common vectors, or None if there are too few."""
    if len(ids) < 4:
        return None
    return Pair(dataclasses.replace(first, ids=ids), dataclasses.replace(second, ids=other), owner)


def _same_texts(
    first: Subject, second: Subject, mine: np.ndarray, theirs: np.ndarray, number: np.ndarray
) -> np.ndarray:
    """Return whether text `number` of a row is equal in both caches."""
    if first.cache.meta.manifest == second.cache.meta.manifest:
        return np.ones(len(mine), bool)
    same = np.zeros(len(mine), bool)
    for start in range(0, len(mine), 65_536):
        span = slice(start, start + 65_536)
        columns = [
            subject.manifest.table["texts"].take(rows[span]).to_pylist()
            for subject, rows in ((first, mine), (second, theirs))
        ]
        same[span] = [a[k] == b[k] for a, b, k in zip(*columns, number[span].tolist(), strict=True)]
    return same


# ----------------------------------------------------------------------------------------------------
# Spaces


def spaces(pair: Pair) -> dict[str, Any]:
    """Return CKA, Procrustes and rank correlation of one kind of vectors."""
    moments = measures.cross_moments(pair.parts())
    drawn = draw(len(pair), RANKED)
    return {
        "num_rows": len(pair),
        "cka": measures.cka(moments),
        "procrustes": measures.procrustes(moments),
        "rank_correlation": measures.rank_correlation(
            neighbors.take(pair.first, drawn), neighbors.take(pair.second, drawn)
        ),
        "effective_rank": [measures.effective_rank(measures.spectrum(m)) for m in (moments.x, moments.y)],
        "mean_cosine": [measures.mean_cosine(m) for m in (moments.x, moments.y)],
    }


def neighborhoods(pair: Pair) -> tuple[dict[str, Any], np.ndarray, np.ndarray]:
    """Return the overlap @k and the rows whose neighbors changed most; the queried rows and their overlap
    @10.
    """
    at = asked(len(pair), len(pair))
    most = min(max(AT), len(pair) - 1)
    _, a = neighbors.nearest(pair.first, most, at)
    _, b = neighbors.nearest(pair.second, most, at)
    overlap = {str(k): float(measures.neighbor_overlap(a[:, :k], b[:, :k]).mean()) for k in AT if k <= most}
    by_chance = {k: int(k) / (len(pair) - 1) for k in overlap}
    k = min(CHANGED_AT, most)
    share, regret = (
        measures.neighbor_overlap(a[:, :k], b[:, :k]),
        _regret(pair.first, at, a[:, :k], b[:, :k]),
    )
    order = np.lexsort((-regret, share))[:LISTED]
    changed = [
        {
            "row": int(pair.owner[at[i]]),
            "overlap": float(share[i]),
            "regret": float(regret[i]),
            "neighbours": pair.owner[a[i, :SHOWN_NEIGHBORS]].tolist(),
            "neighbours_against": pair.owner[b[i, :SHOWN_NEIGHBORS]].tolist(),
        }
        for i in order
    ]
    said = {
        "overlap": overlap,
        "by_chance": by_chance,
        "asked": len(at),
        "num_rows": len(pair),
        "changed_at": k,
        "changed": changed,
    }
    return said, pair.owner[at], share


def _regret(first: Vectors, at: np.ndarray, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Return how much farther the neighbors of the second cache are in the first one: a mean cosine."""
    found = np.empty(len(at), np.float32)
    for start in range(0, len(at), 1024):
        span = slice(start, start + 1024)
        own = neighbors.take(first, at[span])
        near = [
            neighbors.take(first, part[span].reshape(-1)).reshape(*part[span].shape, -1) for part in (a, b)
        ]
        left, right = (np.einsum("qd,qkd->qk", own, part).mean(1) for part in near)
        found[span] = left - right
    return found


# ----------------------------------------------------------------------------------------------------
# Retrieval


def retrieval(pictures: Pair, texts: Pair, manifest: Any) -> dict[str, Any]:
    """Return the recalls of both caches on the same queries, and texts whose image entered or left the top
    ten.
    """
    kept = np.flatnonzero(np.isin(texts.owner, pictures.owner))
    owner = np.searchsorted(pictures.owner, texts.owner[kept])
    at = asked(len(kept), len(pictures))
    candidates = np.arange(len(pictures))
    ranks = [
        matching.strict_ranks(neighbors.take(t, kept[at]), owner[at], p, candidates)
        for t, p in ((texts.first, pictures.first), (texts.second, pictures.second))
    ]
    with_text = np.unique(owner)
    back = with_text[asked(len(with_text), len(kept))]
    back_ranks = [
        matching.strict_ranks(neighbors.take(p, back), back, dataclasses.replace(t, ids=t.ids[kept]), owner)
        for t, p in ((texts.first, pictures.first), (texts.second, pictures.second))
    ]
    rows, numbers = texts.owner[kept[at]], texts.first.ids[kept[at]] % texts.first.per_row
    said: dict[str, Any] = {
        "text_to_image": [matching.recalls(found) for found in ranks],
        "image_to_text": [matching.recalls(found) for found in back_ranks],
        "queries": [len(at), len(back)],
        "at": FOUND_AT,
    }
    for name, (before, after) in (("lost", ranks), ("gained", ranks[::-1])):
        changed = np.flatnonzero((before <= FOUND_AT) & (after > FOUND_AT))
        order = changed[np.argsort(-after[changed] / before[changed], kind="stable")]
        said[name] = {
            "count": len(changed),
            "worst": [
                {
                    "row": int(rows[i]),
                    "text": manifest.row(int(rows[i])).texts[int(numbers[i])],
                    "ranks": [int(ranks[0][i]), int(ranks[1][i])],
                }
                for i in order[:LISTED].tolist()
            ],
        }
    return said


def against(first: Subject, second: Subject, joined: Joined) -> tuple[dict[str, Any], np.ndarray]:
    """Return the whole comparison, and the neighbor overlap of each row of `first.main` (nan: not
    computed).
    """
    pictures, texts = joined.pictures, joined.texts
    said: dict[str, Any] = {"joined": joined.counts, "left_out": {}}
    overlap = np.full(len(first.main), np.nan, np.float32)
    for name, pair in (("pictures", pictures), ("texts", texts)):
        if pair is None:
            said["left_out"][name] = f"fewer than four usable {name} are in both caches"
            continue
        said[name] = spaces(pair)
    shown = pictures or (texts and _one_a_row(texts))
    if shown is not None:
        said["neighbourhoods"], found, share = neighborhoods(shown)
        mine = np.flatnonzero(np.isin(first.rows, found))
        overlap[mine] = share[np.searchsorted(found, first.rows[mine])]
    both = pictures is not None and texts is not None and bool(np.isin(texts.owner, pictures.owner).any())
    if pictures is not None and texts is not None and first.both and second.both and both:
        said["retrieval"] = retrieval(pictures, texts, first.manifest)
    else:
        reasons = [f"{s.cache.path}: {s.left_out['pairs']}" for s in (first, second) if "pairs" in s.left_out]
        said["left_out"]["retrieval"] = "; ".join(reasons) or "no picture and its text are in both caches"
    return said, overlap


def _one_a_row(texts: Pair) -> Pair | None:
    """Return the first text of each row."""
    first = np.unique(texts.owner, return_index=True)[1]
    return _pair(
        texts.first,
        texts.second,
        texts.first.ids[first],
        texts.second.ids[first],
        texts.owner[first],
    )
