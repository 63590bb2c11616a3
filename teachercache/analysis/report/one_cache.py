"""Everything that is said of one cache, as a dict of plain numbers and short lists of rows. Draws nothing.

A row in it is always under `row`, `rows` or `neighbours`, so that whoever shows the lists knows which pictures to read.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from teachercache.analysis import clusters, matching, measures, neighbours
from teachercache.analysis.report.opened import ALL_PAIRS, Subject, asked, draw, rows_of
from teachercache.cache import store
from teachercache.core.errors import UserError
from teachercache.search import index
from teachercache.search.vectors import Vectors, chunks

NEAR = 0.95  # cosine from which two rows are near duplicates
NEIGHBOURS = 10
LISTED = 50  # rows of a list
GROUPS = 200  # groups of duplicates that are listed
REFERENCE = 4096  # pairs that a caption is weighed against
MATRIX = 100  # rows of the similarity matrix


@dataclasses.dataclass
class PerRow:
    """What is known of each row of `Subject.main`, for the map and for slices; nan or -1 where it was not asked."""

    similarity: np.ndarray  # cosine to its worst text
    surprise: np.ndarray
    lonely: np.ndarray  # 1 - mean cosine to its neighbours
    cluster: np.ndarray
    found: np.ndarray  # rank of its picture for its first text


def empty_per_row(count: int) -> PerRow:
    """Nothing is known yet."""
    unknown = [np.full(count, np.nan, np.float32) for _ in range(4)]
    return PerRow(unknown[0], unknown[1], unknown[2], np.full(count, -1, np.int32), unknown[3])


def head(subject: Subject) -> dict[str, Any]:
    """Which cache it is and how much of it can be used."""
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
    """Rows and texts that cannot be used, by reason; the first of them."""
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
    """Shape of the space of pictures and of that of texts; the moments, for maps."""
    found = {
        name: measures.moments(part for _, part in chunks(vectors))
        for name, vectors in (("pictures", subject.pictures), ("texts", subject.texts))
        if vectors
    }
    said: dict[str, Any] = {}
    for name, values in found.items():
        vectors = subject.pictures if name == "pictures" else subject.texts
        assert vectors is not None
        variances = measures.spectrum(values)
        shares = variances / max(float(variances.sum()), 1e-12)
        said[name] = {
            "dim": len(variances),
            "effective_rank": measures.effective_rank(variances),
            "dims_for_90_percent": int(np.searchsorted(np.cumsum(shares), 0.9) + 1),
            "mean_cosine": measures.mean_cosine(values),
            "uniformity": measures.uniformity(neighbours.take(vectors, draw(len(vectors), 4000))),
            "spectrum": shares.tolist(),
        }
    if subject.both:
        said["modality_gap"] = measures.modality_gap(found["pictures"], found["texts"])
    return said, found


def pairs(subject: Subject, known: PerRow) -> dict[str, Any]:
    """Cosines of pictures to their texts and to others', and the worst pairs, at most one a row."""
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
    np.fmin.at(known.similarity, owner, matched)
    np.fmax.at(known.surprise, owner, surprise)
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
    """Share of (own, other) pairs of cosines in which the own is higher; equal ones count half."""
    low = np.sort(low)
    below = np.searchsorted(low, high, "left") + np.searchsorted(low, high, "right")
    return float(below.mean() / (2 * len(low)))


def retrieval(subject: Subject, known: PerRow) -> dict[str, Any]:
    """Recalls in both directions among all rows, by strict ranks."""
    pictures, texts = subject.pictures, subject.texts
    assert pictures is not None
    assert texts is not None
    owner = np.searchsorted(pictures.ids, rows_of(texts))
    at = asked(len(texts), len(pictures))
    by_text = matching.strict_ranks(neighbours.take(texts, at), owner[at], pictures, np.arange(len(pictures)))
    first = np.unique(owner[at], return_index=True)
    known.found[first[0]] = by_text[first[1]]
    with_text = np.unique(owner)
    back = with_text[asked(len(with_text), len(texts))]
    by_picture = matching.strict_ranks(neighbours.take(pictures, back), back, texts, owner)
    return {
        "text_to_image": {**matching.recalls(by_text), "queries": len(at), "candidates": len(pictures)},
        "image_to_text": {**matching.recalls(by_picture), "queries": len(back), "candidates": len(texts)},
    }


def matrix(subject: Subject, known: PerRow) -> dict[str, Any]:
    """Cosines of some pictures (rows) to their first texts (columns), clusters together; diagonal against the rest."""
    pictures, firsts = subject.pictures, subject.firsts
    assert pictures is not None
    assert firsts is not None
    at = draw(len(firsts), MATRIX)
    place = np.searchsorted(pictures.ids, rows_of(firsts)[at])
    order = np.argsort(known.cluster[place], kind="stable")
    at, place = at[order], place[order]
    values = neighbours.take(pictures, place) @ neighbours.take(firsts, at).T
    diagonal, total, n = float(np.trace(values)), float(values.sum()), len(values)
    rest = (total - diagonal) / (n * (n - 1)) if n > 1 else float("nan")
    return {
        "rows": rows_of(firsts)[at].tolist(),
        "values": np.round(values, 3).tolist(),
        "diagonal": diagonal / n,
        "rest": rest,
        "gap": diagonal / n - rest,
    }


# ----------------------------------------------------------------------------------------------------
# Rows among rows


def crowd(
    subject: Subject, known: PerRow, centres: np.ndarray | None
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Outliers and hubness, from each row's nearest others: of rows by chance and of those far from all centres."""
    main, rows = subject.main, subject.rows
    by_chance = at = asked(len(main), len(main))
    if len(at) < len(main) and centres is not None:
        far = neighbours.far_from_centres(main, centres)[1]
        at = np.union1d(at, np.argsort(-far, kind="stable")[: len(at)])
    cosines, found = neighbours.nearest(main, NEIGHBOURS, at)
    known.lonely[at] = neighbours.outlier_scores(cosines)
    worst = at[np.argsort(-known.lonely[at], kind="stable")[:LISTED]]
    outliers = {
        "asked": len(at),
        "num_rows": len(main),
        "neighbours": found.shape[1],
        "worst": [{"row": int(rows[i]), "distance": float(known.lonely[i])} for i in worst],
    }
    counts = measures.occurrences(found[np.isin(at, by_chance)], len(main))
    hubs = np.argsort(-counts, kind="stable")[:20]
    hubness = {
        "asked": len(by_chance),
        "neighbours": found.shape[1],
        "skewness": measures.skewness(counts),
        "most": int(counts.max()),
        "never": float((counts == 0).mean()),
        "hubs": [{"row": int(rows[i]), "count": int(counts[i])} for i in hubs],
    }
    return outliers, hubness


def duplicates(subject: Subject, threshold: float = NEAR) -> dict[str, Any]:
    """Rows that are the same or nearly so, in groups, most alike first; those across splits are leaks."""
    main, rows = subject.main, subject.rows
    exact = neighbours.exact_groups(main)
    indexed, at = _indexed_pairs(subject, threshold), asked(len(main), len(main))
    if indexed is None:
        near, cosines, count = neighbours.near_pairs(main, threshold, None if len(at) == len(main) else at)
    else:
        (near, cosines), at = indexed, np.arange(len(main))
        count = len(near)
    splits = subject.manifest.table["split"]
    same = {i: number for number, group in enumerate(exact) for i in group}
    chain = [(group[0], i) for group in exact for i in group[1:]]
    groups = neighbours.grouped([*chain, *near.tolist()])
    lowest = _lowest(groups, near, cosines)
    leaks = 0
    listed: list[dict[str, Any]] = []
    for number, group in enumerate(groups):
        found = sorted({splits[int(rows[i])].as_py() for i in group})
        leaks += len(found) > 1
        if len(listed) < GROUPS or (len(found) > 1 and len(listed) < 2 * GROUPS):
            numbers = {same.get(i, -1) for i in group}
            listed.append(
                {
                    "rows": rows[group].tolist(),
                    "cosine": lowest[number],
                    "splits": found,
                    "exact": len(numbers) == 1 and -1 not in numbers,
                    "leak": len(found) > 1,
                }
            )
    return {
        "threshold": threshold,
        "pairs": count,
        "exact_groups": len(exact),
        "near_groups": len(groups),
        "leaks": leaks,
        "asked": len(at),
        "num_rows": len(main),
        "approximate": indexed is not None,
        "groups": listed,
    }


def _lowest(groups: Sequence[Sequence[int]], near: np.ndarray, cosines: np.ndarray) -> list[float]:
    """The lowest cosine by which each group hangs together."""
    number = {i: n for n, group in enumerate(groups) for i in group}
    lowest = [1.0] * len(groups)
    for (i, _), cosine in zip(near.tolist(), cosines.tolist(), strict=True):
        lowest[number[i]] = min(lowest[number[i]], cosine)
    return lowest


def _indexed_pairs(subject: Subject, threshold: float) -> tuple[np.ndarray, np.ndarray] | None:
    """Near pairs of all rows by the FAISS index beside a cache that is too large to compare all with all."""
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
    for first, part in neighbours.parts(main):
        scores, ids = opened.search(part, NEIGHBOURS + 1)
        i, k = np.nonzero((scores >= threshold) & (ids >= 0))
        other = neighbours.positions(main.ids, ids[i, k])
        once = first + i < other
        kept.append(np.stack([first + i, other], 1)[once])
        cosines.append(scores[i, k][once])
    pairs_found, found = np.concatenate(kept), np.concatenate(cosines)
    order = np.argsort(-found, kind="stable")
    return pairs_found[order], found[order]


def groups_of_rows(subject: Subject, known: PerRow, centres: np.ndarray) -> list[dict[str, Any]]:
    """Clusters with the words of their texts and the rows at their middle, largest first."""
    main, rows = subject.main, subject.rows
    known.cluster[:], distance = neighbours.far_from_centres(main, centres)
    order = np.argsort(-np.bincount(known.cluster, minlength=len(centres)), kind="stable")
    known.cluster[:] = np.argsort(order)[known.cluster]
    found = []
    for number in range(len(centres)):
        mine = np.flatnonzero(known.cluster == number)
        if len(mine):
            mine = mine[np.argsort(distance[mine], kind="stable")]
            texts = [
                text
                for i in rows[mine[: clusters.KEYWORD_TEXTS]].tolist()
                for text in subject.manifest.row(i).texts[:1]
            ]
            found.append(
                {
                    "number": number,
                    "size": len(mine),
                    "keywords": clusters.keywords(texts),
                    "rows": rows[mine[:8]].tolist(),
                }
            )
    return found
