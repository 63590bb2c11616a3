"""Ranks, recalls and accuracies against scikit-learn and torchmetrics; ties never count."""

import numpy as np
import pytest
import torch
from beartype import beartype
from jaxtyping import TypeCheckError, jaxtyped
from sklearn.metrics import balanced_accuracy_score, top_k_accuracy_score
from torchmetrics.retrieval import RetrievalHitRate, RetrievalMRR

from evaluation.metrics.ranking import mean_per_class, recall_at, strict_ranks
from evaluation.results.run import table

QUERIES, ITEMS = 60, 25


def random_scores(seed: int, *, positives: float = 0.1) -> tuple[torch.Tensor, torch.Tensor]:
    """Scores without a tie, and several positives for most queries (one at least)."""
    random = np.random.default_rng(seed)
    scores = torch.from_numpy(
        random.permuted(np.arange(QUERIES * ITEMS)).reshape(QUERIES, ITEMS).astype(np.float32)
    )
    positive = torch.from_numpy(random.random((QUERIES, ITEMS)) < positives)
    positive[torch.arange(QUERIES), torch.from_numpy(random.integers(ITEMS, size=QUERIES))] = True
    return scores, positive


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("k", [1, 5, 10, 25])
def test_recall_is_the_hit_rate_of_torchmetrics(seed, k):
    scores, positive = random_scores(seed)
    assert positive.sum(1).max() > 2
    indexes = torch.arange(QUERIES)[:, None].expand(QUERIES, ITEMS)
    expected = RetrievalHitRate(top_k=k)(scores.flatten(), positive.flatten(), indexes=indexes.flatten())
    ranks, ties = strict_ranks(scores, positive)
    assert recall_at(ranks, k) == pytest.approx(float(expected), abs=1e-7)
    assert not ties.any()


def test_ranks_are_the_place_of_the_best_positive():
    """Sorted by hand; and the mean of 1 / (rank + 1) is torchmetrics' MRR where each query has one positive."""
    scores, positive = random_scores(7)
    ranks, _ = strict_ranks(scores, positive)
    for query in range(QUERIES):
        order = sorted(range(ITEMS), key=lambda item, query=query: -float(scores[query, item]))
        best = next(place for place, item in enumerate(order) if positive[query, item])
        assert int(ranks[query]) == best  # no tie, so the positives above the best are none
    scores, positive = random_scores(8, positives=0)
    indexes = torch.arange(QUERIES)[:, None].expand(QUERIES, ITEMS)
    mrr = RetrievalMRR()(scores.flatten(), positive.flatten(), indexes=indexes.flatten())
    assert float((1 / (strict_ranks(scores, positive)[0] + 1)).mean()) == pytest.approx(float(mrr))


@pytest.mark.parametrize("k", [1, 2, 5])
def test_accuracy_is_that_of_scikit_learn(k):
    random = np.random.default_rng(k)
    scores, labels = random.normal(size=(80, 6)), random.integers(6, size=80)
    positive = torch.nn.functional.one_hot(torch.from_numpy(labels), 6).bool()
    ranks, _ = strict_ranks(torch.from_numpy(scores).float(), positive)
    assert recall_at(ranks, k) == pytest.approx(top_k_accuracy_score(labels, scores, k=k, labels=range(6)))


def test_mean_per_class_is_balanced_accuracy():
    random = np.random.default_rng(0)
    labels = random.choice(5, size=200, p=[0.6, 0.2, 0.1, 0.07, 0.03])
    predicted = np.where(random.random(200) < 0.5, labels, random.integers(5, size=200))
    hits = torch.from_numpy(predicted == labels)
    found = mean_per_class(hits, torch.from_numpy(labels))
    assert found == pytest.approx(balanced_accuracy_score(labels, predicted))
    assert found != pytest.approx(float(hits.double().mean()), abs=1e-3)  # not the plain accuracy


def test_mean_per_class_counts_the_classes_that_occur():
    hits, labels = torch.tensor([True, True, False, True]), torch.tensor([7, 7, 7, 2])
    assert mean_per_class(hits, labels) == pytest.approx((2 / 3 + 1) / 2)


# ----------------------------------------------------------------------------------------------------
# Strict


@pytest.mark.parametrize("value", [0.0, 1.0, -3.5])
def test_constant_scores_are_never_a_hit(value):
    _, positive = random_scores(0)
    positive[0] = True  # a query where all are positive has nothing to tie with
    ranks, ties = strict_ranks(torch.full((QUERIES, ITEMS), value), positive)
    assert recall_at(ranks[1:], 1) == 0
    assert ties[1:].all()
    assert ranks.tolist() == (~positive).sum(1).tolist()  # behind every negative
    assert (int(ranks[0]), bool(ties[0])) == (0, False)


def test_a_tie_with_a_negative_costs_and_a_tie_of_positives_does_not():
    scores = torch.tensor([[3.0, 3.0, 1.0], [3.0, 3.0, 1.0], [3.0, 1.0, 1.0]])
    positive = torch.tensor([[True, False, False], [True, True, False], [True, False, False]])
    ranks, ties = strict_ranks(scores, positive)
    assert ranks.tolist() == [1, 0, 0]
    assert ties.tolist() == [True, False, False]


def test_a_query_without_negatives_is_first_and_one_without_positives_last():
    scores = torch.tensor([[0.1, 0.2], [0.1, 0.2]])
    ranks, ties = strict_ranks(scores, torch.tensor([[True, True], [False, False]]))
    assert ranks.tolist() == [0, 2]
    assert not ties[0]


def test_a_model_that_says_nan_hits_nothing():
    """A student that has diverged must not look perfect: a comparison with NaN is always false."""
    _, positive = random_scores(0, positives=0)
    ranks, _ = strict_ranks(torch.full((QUERIES, ITEMS), torch.nan), positive)
    assert recall_at(ranks, 1) == 0


def test_a_negative_that_is_nan_is_not_beaten():
    ranks, _ = strict_ranks(torch.tensor([[1.0, torch.nan]]), torch.tensor([[True, False]]))
    assert recall_at(ranks, 1) == 0


def test_shapes_are_checked_where_a_checker_runs():
    checked = jaxtyped(typechecker=beartype)(strict_ranks)
    scores, positive = random_scores(0)
    assert torch.equal(checked(scores, positive)[0], strict_ranks(scores, positive)[0])
    for wrong in (positive[:-1], positive.float(), positive[0]):
        with pytest.raises(TypeCheckError):
            checked(scores, wrong)


# ----------------------------------------------------------------------------------------------------
# The table


def test_the_table_has_a_column_per_result_and_a_dash_where_nothing_was_computed():
    results = [
        {"model": "a", "metrics": {"acc1": 0.5, "acc5": None, "num": 3}},
        {"model": "long name", "metrics": {"acc1": 1.0}},
    ]
    assert table(results).splitlines() == [
        "metric  a       long name",
        "acc1    0.5000  1.0000",
        "acc5    -       -",
        "num     3       -",
    ]
