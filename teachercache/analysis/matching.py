"""Compare images with their texts: how well pairs match, and how well one is retrieved by the other.

The functions take arrays or Vectors and return numbers. Ties count as misses.
"""

import numpy as np
from jaxtyping import Float, Int

from teachercache.analysis.neighbors import BLOCK_SCORES, Rows, as_vectors, parts, take

SHARPNESS = 50.0  # half of CLIP's final logit scale: see LOG.md, "which captions are wrong"
TIE = 1e-6  # float32 products of the same two vectors differ by less at any position of a matrix


def pair_cosines(pictures: Rows, texts: Rows, owner: Int[np.ndarray, " t"]) -> Float[np.ndarray, " t"]:
    """Return the cosine of each text to the image at position owner[i]."""
    cosines = np.empty(len(owner), np.float32)
    for first, chunk in parts(texts):
        owners = owner[first : first + len(chunk)]
        cosines[first : first + len(chunk)] = np.einsum("ij,ij->i", chunk, take(pictures, owners))
    return cosines


def surprise(
    pictures: Rows,
    texts: Rows,
    owner: Int[np.ndarray, " t"],
    reference: Int[np.ndarray, " r"],
    *,
    sharpness: float = SHARPNESS,
) -> Float[np.ndarray, " t"]:
    """Return how much better a text and its image match others than each other: high for a wrong caption.

    This is the contrastive loss of each pair, over both directions, against the texts at `reference` and
    their images, without pairs of the same image. Unlike the cosine it does not penalize unusual images.
    """
    others, other_owner = take(texts, reference), owner[reference]
    other_pictures = take(pictures, other_owner)
    values = np.empty(len(owner), np.float32)
    for first, chunk in parts(texts, max(1, BLOCK_SCORES // (8 * max(1, len(reference))))):
        span = slice(first, first + len(chunk))
        images = take(pictures, owner[span])
        same = owner[span, None] == other_owner
        matched = sharpness * np.einsum("ij,ij->i", chunk, images)
        values[span] = sum(
            _log_sum(sharpness * scores, same) for scores in (images @ others.T, chunk @ other_pictures.T)
        )
        values[span] -= 2 * matched
    return values


def _log_sum(scores: np.ndarray, left_out: np.ndarray) -> np.ndarray:
    """Return the logarithm of the mean of exp over each row, without masked entries; -inf if all are
    masked.
    """
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
    """Return the rank, from 1, of the best candidate with the query's owner among those of other owners; ties
    count against it.

    The owners of the candidates ascend; each query has at least one candidate of its own.
    """
    vectors = as_vectors(candidates)
    low, high = np.searchsorted(owner, owners, "left"), np.searchsorted(owner, owners, "right")
    best = np.full(len(queries), -np.inf, np.float32)
    for k in range(int((high - low).max(initial=0))):
        position = low + k
        mine = np.flatnonzero(position < high)
        best[mine] = np.maximum(
            best[mine], np.einsum("ij,ij->i", queries[mine], take(vectors, position[mine]))
        )
    better = np.zeros(len(queries), np.int64)
    for first, chunk in parts(vectors):
        others = owner[first : first + len(chunk)]
        size = max(1, BLOCK_SCORES // len(chunk))
        for start in range(0, len(queries), size):
            span = slice(start, start + size)
            scores = queries[span] @ chunk.T
            better[span] += ((scores >= best[span, None] - TIE) & (others != owners[span, None])).sum(1)
    return better + 1


def recalls(ranks: Int[np.ndarray, " q"]) -> dict[str, float]:
    """Return R@1, R@5, R@10 and the median rank."""
    shares = {f"R@{k}": float((ranks <= k).mean()) for k in (1, 5, 10)}
    return {**shares, "median_rank": float(np.median(ranks))}
