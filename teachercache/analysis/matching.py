"""Pictures and the texts that belong to them: how well a pair matches, how well the one is found by the other.

Arrays or Vectors in, numbers out. Ties never count as found. Not for one kind alone: see `neighbours.py`.
"""

import numpy as np
from jaxtyping import Float, Int

from teachercache.analysis.neighbours import BLOCK_SCORES, Rows, as_vectors, parts, take

SHARPNESS = 50.0  # half of CLIP's final logit scale: see LOG.md, "which captions are wrong"
TIE = 1e-6  # float32 products of the same two vectors differ by less, wherever they stand in a matrix


def pair_cosines(pictures: Rows, texts: Rows, owner: Int[np.ndarray, " t"]) -> Float[np.ndarray, " t"]:
    """Cosine of each text to the picture at position owner[i]."""
    found = np.empty(len(owner), np.float32)
    for first, part in parts(texts):
        mine = owner[first : first + len(part)]
        found[first : first + len(part)] = np.einsum("ij,ij->i", part, take(pictures, mine))
    return found


def surprise(
    pictures: Rows,
    texts: Rows,
    owner: Int[np.ndarray, " t"],
    reference: Int[np.ndarray, " r"],
    *,
    sharpness: float = SHARPNESS,
) -> Float[np.ndarray, " t"]:
    """How much better a text and its picture go with others than with each other: high for a wrong caption.

    The contrastive loss of each pair, over both directions, against the texts at `reference` and their pictures, pairs
    of the same picture left out. Unlike the cosine it asks for no more of an odd picture than of a usual one.
    """
    others, other_owner = take(texts, reference), owner[reference]
    other_pictures = take(pictures, other_owner)
    found = np.empty(len(owner), np.float32)
    for first, part in parts(texts, max(1, BLOCK_SCORES // (8 * max(1, len(reference))))):
        span = slice(first, first + len(part))
        own = take(pictures, owner[span])
        same = owner[span, None] == other_owner
        matched = sharpness * np.einsum("ij,ij->i", part, own)
        found[span] = sum(
            _log_sum(sharpness * scores, same) for scores in (own @ others.T, part @ other_pictures.T)
        )
        found[span] -= 2 * matched
    return found


def _log_sum(scores: np.ndarray, left_out: np.ndarray) -> np.ndarray:
    """Logarithm of the mean of exp over a row, without what is left out; -inf where that is everything."""
    scores = np.where(left_out, -np.inf, scores)
    most = np.maximum(scores.max(1, initial=-np.inf), -1e30)
    with np.errstate(divide="ignore"):
        return most + np.log(np.exp(scores - most[:, None]).sum(1) / np.maximum((~left_out).sum(1), 1))


def strict_ranks(
    queries: Float[np.ndarray, "q dim"],
    owners: Int[np.ndarray, " q"],
    candidates: Rows,
    owner: Int[np.ndarray, " n"],
) -> Int[np.ndarray, " q"]:
    """Rank, from 1, of the best candidate that has the query's owner among those of others; a tie is lost.

    `owner` of the candidates ascends; each query has at least one of its own.
    """
    vectors = as_vectors(candidates)
    low, high = np.searchsorted(owner, owners, "left"), np.searchsorted(owner, owners, "right")
    best = np.full(len(queries), -np.inf, np.float32)
    for k in range(int((high - low).max(initial=0))):
        at = low + k
        mine = np.flatnonzero(at < high)
        best[mine] = np.maximum(best[mine], np.einsum("ij,ij->i", queries[mine], take(vectors, at[mine])))
    better = np.zeros(len(queries), np.int64)
    for first, part in parts(vectors):
        others = owner[first : first + len(part)]
        size = max(1, BLOCK_SCORES // len(part))
        for start in range(0, len(queries), size):
            span = slice(start, start + size)
            scores = queries[span] @ part.T
            better[span] += ((scores >= best[span, None] - TIE) & (others != owners[span, None])).sum(1)
    return better + 1


def recalls(ranks: Int[np.ndarray, " q"]) -> dict[str, float]:
    """R@1, R@5, R@10 and the median rank."""
    shares = {f"R@{k}": float((ranks <= k).mean()) for k in (1, 5, 10)}
    return {**shares, "median_rank": float(np.median(ranks))}
