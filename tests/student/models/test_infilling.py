"""BART's infilling: lengths against Poisson's own formula, spans against a simulation of their own."""

import math
from collections import Counter

import numpy as np
import pytest

from student.models.seq2seq.infilling import draw_lengths, infill

MASK = -1


def test_lengths_are_poisson_with_a_mean_of_three_and_use_up_the_share():
    found = [draw_lengths(40_000, np.random.default_rng(seed), share=0.15) for seed in range(5)]
    assert [int(lengths.sum()) for lengths in found] == [6000] * 5
    lengths = np.concatenate([one[:-1] for one in found])  # the last one is cut to fit
    counts = Counter(lengths.tolist())
    assert lengths.mean() == pytest.approx(3, abs=0.06)
    for k in range(8):
        chance = math.exp(-3) * 3**k / math.factorial(k)
        sigma = math.sqrt(chance * (1 - chance) * len(lengths))
        assert abs(counts[k] - chance * len(lengths)) < 4 * sigma, k


@pytest.mark.parametrize(
    ("words", "share", "budget"),
    [(1, 0.15, 1), (6, 0.15, 1), (7, 0.15, 2), (20, 0.15, 3), (10, 0.3, 3), (5, 1.0, 5), (0, 0.15, 0)],
)
def test_the_share_is_rounded_up(words, share, budget):
    for seed in range(20):
        assert draw_lengths(words, np.random.default_rng(seed), share=share).sum() == budget


def simulate(words: int, random, share: float) -> tuple[int, int]:
    """Words that go and masks that come, by intervals on a line."""
    budget, lengths = math.ceil(share * words - 1e-9), []
    while sum(lengths) < budget:
        lengths.append(min(int(random.poisson(3)), budget - sum(lengths)))
    spans = [length for length in lengths if length]
    begins = random.choice(words, len(spans), replace=False).tolist()
    intervals = list(zip(begins, spans, strict=True))
    gone = {word for begin, size in intervals for word in range(begin, min(words, begin + size))}
    heads = [begin for begin in begins if not any(other < begin < other + size for other, size in intervals)]
    return len(gone), len(heads) + len(lengths) - len(spans)


@pytest.mark.parametrize(("words", "share"), [(12, 0.15), (60, 0.15), (60, 0.3)])
def test_words_that_go_and_masks_that_come_are_those_of_a_simulation(words, share):
    ids = list(range(words))
    ours, theirs = [], []
    for seed in range(1500):
        holes = infill(ids, [True] * words, MASK, np.random.default_rng(seed), share=share)
        kept = [one for one in holes if one != MASK]
        assert kept == sorted(set(kept))  # what is left is in order, and nothing is there twice
        ours.append((words - len(kept), len(holes) - len(kept)))
        theirs.append(simulate(words, np.random.default_rng([7, seed]), share))
    sigma = np.std(theirs, axis=0) * math.sqrt(2 / len(theirs))
    assert (np.abs(np.mean(ours, axis=0) - np.mean(theirs, axis=0)) < 4 * sigma).all()
    if share == 0.15:
        assert np.mean(ours, axis=0)[0] / words == pytest.approx(0.15, abs=0.02)


def test_a_word_goes_with_all_its_tokens_and_one_mask_stands_for_a_span():
    starts = [True, False, True, False, False, True] * 10
    word = np.cumsum(starts) - 1
    spans = 0
    for seed in range(300):
        holes = infill(list(range(60)), starts, MASK, np.random.default_rng(seed), share=0.2)
        kept = set(holes) - {MASK}
        gone = {int(word[token]) for token in range(60) if token not in kept}
        assert not gone & {int(word[token]) for token in kept}
        runs = sum(1 for one in gone if one - 1 not in gone)  # neighbouring words that went
        assert 0 <= runs <= holes.count(MASK)
        spans += len(gone) > runs
    assert spans > 200  # most texts lose two neighbours somewhere


def test_the_ends_of_what_there_is():
    assert infill([], [], MASK, np.random.default_rng(0), share=0.15) == []
    found = {
        tuple(infill([5, 6], [False, False], MASK, np.random.default_rng(seed), share=0.15))
        for seed in range(200)
    }
    assert {(MASK,)} < found  # the one word of two tokens
    assert {tuple(one for one in row if one != MASK) for row in found} == {()}
