"""Compute the sections of a report about one cache: numbers and short lists of rows.

Rows are always under the keys in `rows.ROW_NAMES`, so that `rows.mentioned` finds the images to show.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from teachercache.analysis import clusters, matching, measures, neighbors
from teachercache.analysis.report.opened import ALL_PAIRS, Subject, asked, draw, rows_of
from teachercache.cache import store
from teachercache.core.errors import UserError
from teachercache.search import index
from teachercache.search.vectors import Vectors, chunks

NEAR = 0.95  # the least cosine of near duplicates
NEIGHBORS = 10
LISTED = 50  # the length of a list
GROUPS = 200  # the number of groups of duplicates in the list
REFERENCE = 4096  # pairs that a caption is compared with
MATRIX = 100  # the rows of the similarity matrix


@dataclasses.dataclass
class PerRow:
    """Numbers of each row of `Subject.main`, for the map and for slices; nan or -1 if not computed.

    Attributes:
        similarity: The lowest cosine to a text of the row.
        surprise: The highest surprise of a text of the row.
        lonely: 1 - the mean cosine to its nearest neighbors.
        cluster: The number of its cluster.
        rank: The rank of its image for its first text.
    """

    similarity: np.ndarray
    surprise: np.ndarray
    lonely: np.ndarray
    cluster: np.ndarray
    rank: np.ndarray


def empty_per_row(count: int) -> PerRow:
    """Return a PerRow without values."""
    unknown = [np.full(count, np.nan, np.float32) for _ in range(4)]
    return PerRow(unknown[0], unknown[1], unknown[2], np.full(count, -1, np.int32), unknown[3])


def head(subject: Subject) -> dict[str, Any]:
    """Return the identity of the cache and the number of usable rows."""
    cache, meta = subject.cache, subject.cache.meta
    return {
        "path": str(cache.path),
        "teacher": meta.spec.name,
        "weights": meta.spec.weights,
        "data": meta.data,
        "num_rows": meta.rows,
        "usable": len(subject.main),
        "texts": 0 if subject.texts is None else len(subject.texts),
        "views": meta.views,
        "dim": subject.main.dim,
    }


def quarantine(subject: Subject) -> dict[str, Any]:
    """Return the unusable rows and texts by reason, and the first ones."""
    entries = store.quarantined(subject.cache)
    reasons: dict[str, int] = {}
    for entry in entries:
        reason = str(entry["reason"]).split(":")[0]
        reasons[reason] = reasons.get(reason, 0) + 1
    shown = [{"key": entry["key"], "reason": entry["reason"]} for entry in entries[:LISTED]]
    return {"count": len(entries), "reasons": reasons, "first": shown}


# ----------------------------------------------------------------------------------------------------
# Pictures and texts


def space(subject: Subject) -> tuple[dict[str, Any], dict[str, measures.Moments]]:
    """Return the shape of the spaces of images and texts, and their moments for maps."""
    statistics = {
        name: measures.moments(part for _, part in chunks(vectors))
        for name, vectors in (("pictures", subject.pictures), ("texts", subject.texts))
        if vectors
    }
    sections: dict[str, Any] = {}
    for name, values in statistics.items():
        vectors = subject.pictures if name == "pictures" else subject.texts
        assert vectors is not None
        variances = measures.spectrum(values)
        shares = variances / max(float(variances.sum()), 1e-12)
        sections[name] = {
            "dim": len(variances),
            "effective_rank": measures.effective_rank(variances),
            "dims_for_90_percent": int(np.searchsorted(np.cumsum(shares), 0.9) + 1),
            "mean_cosine": measures.mean_cosine(values),
            "uniformity": measures.uniformity(neighbors.take(vectors, draw(len(vectors), 4000))),
            "spectrum": shares.tolist(),
        }
    if subject.both:
        sections["modality_gap"] = measures.modality_gap(statistics["pictures"], statistics["texts"])
    return sections, statistics


def pairs(subject: Subject, per_row: PerRow) -> dict[str, Any]:
    """Return the cosines of images to their texts and to others', and the worst pairs, at most one per
    row.
    """
    pictures, texts = subject.pictures, subject.texts
    assert pictures is not None
    assert texts is not None
    owner = np.searchsorted(pictures.ids, rows_of(texts))
    matched = matching.pair_cosines(pictures, texts, owner)
    strangers = np.random.default_rng(0).integers(1, max(2, len(pictures)), len(owner))
    unmatched = matching.pair_cosines(pictures, texts, (owner + strangers) % len(pictures))
    reference = draw(len(texts), min(REFERENCE, max(512, ALL_PAIRS // (4 * len(texts)))))
    surprise = matching.surprise(pictures, texts, owner, reference)
    low, high = np.min([matched.min(), unmatched.min()]), np.max([matched.max(), unmatched.max()])
    edges = np.linspace(low, high + 1e-6, 61)
    np.fmin.at(per_row.similarity, owner, matched)
    np.fmax.at(per_row.surprise, owner, surprise)
    worst = _worst(subject, owner, matched, surprise)
    return {
        "mean": float(matched.mean()),
        "std": float(matched.std()),
        "others_mean": float(unmatched.mean()),
        "alignment": float((2 - 2 * matched.astype(np.float64)).mean()),
        "auc": _auc(matched, unmatched),
        "histogram": {
            "edges": edges.tolist(),
            "own": np.histogram(matched, edges)[0].tolist(),
            "others": np.histogram(unmatched, edges)[0].tolist(),
        },
        "compared_with": len(reference),
        "worst": worst,
    }


def _worst(
    subject: Subject, owner: np.ndarray, matched: np.ndarray, surprise: np.ndarray
) -> list[dict[str, Any]]:
    assert subject.texts is not None
    rows, seen = rows_of(subject.texts), set()
    listed: list[dict[str, Any]] = []
    for i in np.argsort(-surprise, kind="stable")[: LISTED * max(1, subject.cache.meta.texts)].tolist():
        if owner[i] not in seen and len(listed) < LISTED:
            seen.add(owner[i])
            number = int(subject.texts.ids[i] % subject.texts.per_row)
            listed.append(
                {
                    "row": int(rows[i]),
                    "text": subject.manifest.row(int(rows[i])).texts[number],
                    "cosine": float(matched[i]),
                    "surprise": float(surprise[i]),
                }
            )
    return listed


def _auc(high: np.ndarray, low: np.ndarray) -> float:
    """Return the share of (own, other) pairs of cosines in which the own cosine is higher; ties count
    half.
    """
    low = np.sort(low)
    below = np.searchsorted(low, high, "left") + np.searchsorted(low, high, "right")
    return float(below.mean() / (2 * len(low)))


def retrieval(subject: Subject, per_row: PerRow) -> dict[str, Any]:
    """Return the recalls in both directions among all rows, by strict ranks."""
    pictures, texts = subject.pictures, subject.texts
    assert pictures is not None
    assert texts is not None
    owner = np.searchsorted(pictures.ids, rows_of(texts))
    queries = asked(len(texts), len(pictures))
    by_text = matching.strict_ranks(
        neighbors.take(texts, queries), owner[queries], pictures, np.arange(len(pictures))
    )
    first = np.unique(owner[queries], return_index=True)
    per_row.rank[first[0]] = by_text[first[1]]
    with_text = np.unique(owner)
    back = with_text[asked(len(with_text), len(texts))]
    by_picture = matching.strict_ranks(neighbors.take(pictures, back), back, texts, owner)
    return {
        "text_to_image": {**matching.recalls(by_text), "queries": len(queries), "candidates": len(pictures)},
        "image_to_text": {**matching.recalls(by_picture), "queries": len(back), "candidates": len(texts)},
    }


def matrix(subject: Subject, per_row: PerRow) -> dict[str, Any]:
    """Return the cosines of some images (rows) to their first texts (columns), sorted by cluster."""
    pictures, firsts = subject.pictures, subject.firsts
    assert pictures is not None
    assert firsts is not None
    sample = draw(len(firsts), MATRIX)
    place = np.searchsorted(pictures.ids, rows_of(firsts)[sample])
    order = np.argsort(per_row.cluster[place], kind="stable")
    sample, place = sample[order], place[order]
    values = neighbors.take(pictures, place) @ neighbors.take(firsts, sample).T
    diagonal, total, n = float(np.trace(values)), float(values.sum()), len(values)
    rest = (total - diagonal) / (n * (n - 1)) if n > 1 else float("nan")
    return {
        "rows": rows_of(firsts)[sample].tolist(),
        "values": np.round(values, 3).tolist(),
        "diagonal": diagonal / n,
        "rest": rest,
        "gap": diagonal / n - rest,
    }


# ----------------------------------------------------------------------------------------------------
# Rows among rows


def crowd(
    subject: Subject, per_row: PerRow, centers: np.ndarray | None
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return outliers and hubness, from the nearest neighbors of randomly chosen rows and of those far
    from all centroids.
    """
    main, rows = subject.main, subject.rows
    by_chance = queries = asked(len(main), len(main))
    if len(queries) < len(main) and centers is not None:
        far = neighbors.far_from_centers(main, centers)[1]
        queries = np.union1d(queries, np.argsort(-far, kind="stable")[: len(queries)])
    cosines, nearest = neighbors.nearest(main, NEIGHBORS, queries)
    per_row.lonely[queries] = neighbors.outlier_scores(cosines)
    worst = queries[np.argsort(-per_row.lonely[queries], kind="stable")[:LISTED]]
    outliers = {
        "asked": len(queries),
        "num_rows": len(main),
        "neighbours": nearest.shape[1],
        "worst": [{"row": int(rows[i]), "distance": float(per_row.lonely[i])} for i in worst],
    }
    counts = measures.occurrences(nearest[np.isin(queries, by_chance)], len(main))
    hubs = np.argsort(-counts, kind="stable")[:20]
    hubness = {
        "asked": len(by_chance),
        "neighbours": nearest.shape[1],
        "skewness": measures.skewness(counts),
        "most": int(counts.max()),
        "never": float((counts == 0).mean()),
        "hubs": [{"row": int(rows[i]), "count": int(counts[i])} for i in hubs],
    }
    return outliers, hubness


def duplicates(subject: Subject, threshold: float = NEAR) -> dict[str, Any]:
    """Return groups of identical or nearly identical rows, most similar first; groups across splits are
    leaks.
    """
    main, rows = subject.main, subject.rows
    exact = neighbors.exact_groups(main)
    indexed, queries = _indexed_pairs(subject, threshold), asked(len(main), len(main))
    if indexed is None:
        near, cosines, count = neighbors.near_pairs(
            main, threshold, None if len(queries) == len(main) else queries
        )
    else:
        (near, cosines), queries = indexed, np.arange(len(main))
        count = len(near)
    splits = subject.manifest.table["split"]
    same = {i: number for number, group in enumerate(exact) for i in group}
    chain = [(group[0], i) for group in exact for i in group[1:]]
    groups = neighbors.grouped([*chain, *near.tolist()])
    lowest = _lowest(groups, near, cosines)
    leaks = 0
    listed: list[dict[str, Any]] = []
    for number, group in enumerate(groups):
        group_splits = sorted({splits[int(rows[i])].as_py() for i in group})
        leaks += len(group_splits) > 1
        if len(listed) < GROUPS or (len(group_splits) > 1 and len(listed) < 2 * GROUPS):
            numbers = {same.get(i, -1) for i in group}
            listed.append(
                {
                    "rows": rows[group].tolist(),
                    "cosine": lowest[number],
                    "splits": group_splits,
                    "exact": len(numbers) == 1 and -1 not in numbers,
                    "leak": len(group_splits) > 1,
                }
            )
    return {
        "threshold": threshold,
        "pairs": count,
        "exact_groups": len(exact),
        "near_groups": len(groups),
        "leaks": leaks,
        "asked": len(queries),
        "num_rows": len(main),
        "approximate": indexed is not None,
        "groups": listed,
    }


def _lowest(groups: Sequence[Sequence[int]], near: np.ndarray, cosines: np.ndarray) -> list[float]:
    """Return the lowest cosine that connects each group."""
    number = {i: n for n, group in enumerate(groups) for i in group}
    lowest = [1.0] * len(groups)
    for (i, _), cosine in zip(near.tolist(), cosines.tolist(), strict=True):
        lowest[number[i]] = min(lowest[number[i]], cosine)
    return lowest


def _indexed_pairs(subject: Subject, threshold: float) -> tuple[np.ndarray, np.ndarray] | None:
    """Return near pairs by the FAISS index, for a cache that is too large to compare all pairs."""
    main = subject.main
    if len(asked(len(main), len(main))) == len(main) or main.texts:
        return None
    try:
        opened = index.open_index(subject.cache, subject.cache.meta.spec.image_vector)
    except UserError:
        return None
    if isinstance(opened, Vectors):
        return None
    kept, cosines = [np.empty((0, 2), np.int64)], [np.empty(0, np.float32)]
    for first, chunk in neighbors.parts(main):
        scores, ids = opened.search(chunk, NEIGHBORS + 1)
        i, k = np.nonzero((scores >= threshold) & np.isin(ids, main.ids))
        other = neighbors.positions(main.ids, ids[i, k])
        once = first + i < other
        kept.append(np.stack([first + i, other], 1)[once])
        cosines.append(scores[i, k][once])
    pairs_found, all_cosines = np.concatenate(kept), np.concatenate(cosines)
    order = np.argsort(-all_cosines, kind="stable")
    return pairs_found[order], all_cosines[order]


def groups_of_rows(subject: Subject, per_row: PerRow, centers: np.ndarray) -> list[dict[str, Any]]:
    """Return clusters with keywords of their texts and their most central rows, largest first."""
    main, rows = subject.main, subject.rows
    per_row.cluster[:], distance = neighbors.far_from_centers(main, centers)
    order = np.argsort(-np.bincount(per_row.cluster, minlength=len(centers)), kind="stable")
    per_row.cluster[:] = np.argsort(order)[per_row.cluster]
    groups = []
    for number in range(len(centers)):
        members = np.flatnonzero(per_row.cluster == number)
        if len(members):
            members = members[np.argsort(distance[members], kind="stable")]
            texts = [
                text
                for i in rows[members[: clusters.KEYWORD_TEXTS]].tolist()
                for text in subject.manifest.row(i).texts[:1]
            ]
            groups.append(
                {
                    "number": number,
                    "size": len(members),
                    "keywords": clusters.keywords(texts),
                    "rows": rows[members[:8]].tolist(),
                }
            )
    return groups
