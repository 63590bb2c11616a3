"""Ranks, recalls and accuracies. They are strict: a tie is never a hit, and the rate of ties is reported."""

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import one_hot

CHUNK = 4096  # queries ranked at a time


def strict_ranks(
    scores: Float[Tensor, "queries items"], positive: Bool[Tensor, "queries items"]
) -> tuple[Int[Tensor, " queries"], Bool[Tensor, " queries"]]:
    """Rank the best positive item of each query.

    Args:
        scores: Scores of the items; NaN ranks a positive last and a negative first.
        positive: Which items are right.

    Returns:
        The rank from 0, where negatives with an equal score come first, so that constant scores rank last; and whether
        a negative has the same score as the best positive.
    """
    nan = scores.isnan()
    scores = scores.masked_fill(nan & positive, -torch.inf).masked_fill(nan & ~positive, torch.inf)
    best = scores.masked_fill(~positive, -torch.inf).amax(1, keepdim=True)
    negatives = ~positive
    ranks = ((scores >= best) & negatives).sum(1)
    ties = ((scores == best) & negatives).any(1)
    return ranks, ties


def recall_at(ranks: Int[Tensor, " queries"], k: int) -> float:
    """Return the share of queries with a positive among the first k items."""
    return float((ranks < k).double().mean())


def mean_per_class(hits: Bool[Tensor, " n"], labels: Int[Tensor, " n"]) -> float:
    """Return the mean of the classes' shares of hits, over the classes that occur."""
    shares = [hits[labels == label].double().mean() for label in labels.unique()]
    return float(torch.stack(shares).mean())


def accuracies(scores: Float[Tensor, "n classes"], target: Int[Tensor, " n"]) -> dict[str, float | None]:
    """Compute acc1, acc5, mean_per_class_recall and tie_rate; acc5 is None if there are at most five classes."""
    ranks, ties = torch.empty(len(target), dtype=torch.int64), torch.empty(len(target), dtype=torch.bool)
    for start in range(0, len(target), CHUNK):
        chunk = slice(start, start + CHUNK)
        positive = one_hot(target[chunk], scores.shape[1]).bool()
        ranks[chunk], ties[chunk] = strict_ranks(scores[chunk], positive)
    return {
        "acc1": recall_at(ranks, 1),
        "acc5": recall_at(ranks, 5) if scores.shape[1] > 5 else None,
        "mean_per_class_recall": mean_per_class(ranks < 1, target),
        "tie_rate": float(ties.double().mean()),
    }


def average_precision(scores: Float[Tensor, " n"], positive: Bool[Tensor, " n"]) -> float:
    """Compute the average precision as scikit-learn defines it.

    Rows with equal scores count together, so constant scores are at chance. NaN ranks a positive last and a negative
    first.
    """
    nan = scores.isnan()
    scores = scores.double().masked_fill(nan & positive, -torch.inf).masked_fill(nan & ~positive, torch.inf)
    order = scores.argsort(descending=True)
    scores, hits = scores[order], positive[order].double().cumsum(0)
    last = torch.cat(
        [scores[1:] != scores[:-1], torch.ones(1, dtype=torch.bool)]
    )  # of each group of equal scores
    hits, retrieved = hits[last], torch.arange(1, len(scores) + 1)[last]
    gained = torch.diff(hits, prepend=torch.zeros(1, dtype=hits.dtype)) / positive.sum()
    return float((gained * hits / retrieved).sum())


def bootstrap_interval(
    hits: Bool[np.ndarray, " n"], *, draws: int = 2000, seed: int = 0
) -> tuple[float, float]:
    """Return the 95 % percentile bootstrap interval of the share of hits.

    Args:
        hits: Whether each of n rows is a hit.
        draws: Number of bootstrap samples of n rows. Their numbers of hits are binomial, and drawn as such.
        seed: Seed of the draws.

    Returns:
        The lower and the upper end.
    """
    shares = np.random.default_rng(seed).binomial(len(hits), hits.mean(), draws) / len(hits)
    low, high = np.quantile(shares, (0.025, 0.975))
    return float(low), float(high)
