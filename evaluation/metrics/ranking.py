"""Ranks, recalls and accuracies, strict: a tie is never a hit, and how often ties happen is reported."""

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import one_hot

CHUNK = 4096  # queries ranked at once


def strict_ranks(
    scores: Float[Tensor, "queries items"], positive: Bool[Tensor, "queries items"]
) -> tuple[Int[Tensor, " queries"], Bool[Tensor, " queries"]]:
    """Rank (from 0) of each query's best positive, and whether a negative ties with it.

    Every negative that scores at least as high comes first: a model that says the same of everything is last, and so
    is one that says NaN.
    """
    unknown = scores.isnan()
    scores = scores.masked_fill(unknown & positive, -torch.inf).masked_fill(unknown & ~positive, torch.inf)
    best = scores.masked_fill(~positive, -torch.inf).amax(1, keepdim=True)
    negatives = ~positive
    ranks = ((scores >= best) & negatives).sum(1)
    ties = ((scores == best) & negatives).any(1)
    return ranks, ties


def recall_at(ranks: Int[Tensor, " queries"], k: int) -> float:
    """Share of queries with a positive among the first k."""
    return float((ranks < k).double().mean())


def mean_per_class(hits: Bool[Tensor, " n"], labels: Int[Tensor, " n"]) -> float:
    """Mean over the classes that occur of the share of hits."""
    shares = [hits[labels == label].double().mean() for label in labels.unique()]
    return float(torch.stack(shares).mean())


def accuracies(scores: Float[Tensor, "n classes"], target: Int[Tensor, " n"]) -> dict[str, float | None]:
    """acc1, acc5, mean_per_class_recall and tie_rate of a classifier; acc5 is None where it would say nothing."""
    ranks, ties = torch.empty(len(target), dtype=torch.int64), torch.empty(len(target), dtype=torch.bool)
    for start in range(0, len(target), CHUNK):
        part = slice(start, start + CHUNK)
        ranks[part], ties[part] = strict_ranks(scores[part], one_hot(target[part], scores.shape[1]).bool())
    return {
        "acc1": recall_at(ranks, 1),
        "acc5": recall_at(ranks, 5) if scores.shape[1] > 5 else None,
        "mean_per_class_recall": mean_per_class(ranks < 1, target),
        "tie_rate": float(ties.double().mean()),
    }


def average_precision(scores: Float[Tensor, " n"], positive: Bool[Tensor, " n"]) -> float:
    """Area under precision and recall as scikit-learn sums it; equal scores count together, so all equal is chance.

    A score that is NaN counts against its row.
    """
    unknown = scores.isnan()
    scores = (
        scores.double()
        .masked_fill(unknown & positive, -torch.inf)
        .masked_fill(unknown & ~positive, torch.inf)
    )
    order = scores.argsort(descending=True)
    scores, hits = scores[order], positive[order].double().cumsum(0)
    last = torch.cat([scores[1:] != scores[:-1], torch.ones(1, dtype=torch.bool)])  # of each group of equals
    hits, found = hits[last], torch.arange(1, len(scores) + 1)[last]
    gained = torch.diff(hits, prepend=torch.zeros(1, dtype=hits.dtype)) / positive.sum()
    return float((gained * hits / found).sum())


def bootstrap_interval(
    hits: Bool[np.ndarray, " n"], *, draws: int = 2000, seed: int = 0
) -> tuple[float, float]:
    """The middle 95 % of the share of hits over `draws` samples of n with replacement (percentile bootstrap).

    A sample's number of hits is binomial, so nothing is resampled row by row.
    """
    shares = np.random.default_rng(seed).binomial(len(hits), hits.mean(), draws) / len(hits)
    low, high = np.quantile(shares, (0.025, 0.975))
    return float(low), float(high)
