"""Ranks, recalls and accuracies, strict: a tie is never a hit, and how often ties happen is reported."""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


def strict_ranks(scores: Float[Tensor, "queries items"], positive: Bool[Tensor, "queries items"]
                 ) -> tuple[Int[Tensor, " queries"], Bool[Tensor, " queries"]]:  # fmt: skip
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
