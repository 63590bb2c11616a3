"""CIDEr-D against a loop over the paper's equations, and against pycocoevalcap where it is installed."""

import math

import pytest

from evaluation.metrics.cider import cider_d, document_frequency
from student.models.seq2seq.self_critical import reward_of, words_of

REFERENCES = [
    ["a red bird on a branch", "a bird sits on a branch", "red bird"],
    ["two dogs play on the grass", "dogs on grass"],
    ["a red car on the road", "the car is red and it is on a long road"],
    ["a cat"],
]
CANDIDATES = [
    "a red bird on a branch",
    "dogs dogs dogs on on grass",
    "a red car",
    "a bird on the road",
    "zebra",
    "",
]


def grams(words: list[str], n: int) -> list[tuple]:
    return [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]


def slow_cider_d(candidate: str, references: list[str]) -> float:
    """10 / (4 m) sum_n sum_j exp(-(l(c) - l(s))^2 / 2 sigma^2) min(g(c), g(s)) g(s) / |g(c)| |g(s)|."""
    total, c = 0.0, candidate.split()
    for n in (1, 2, 3, 4):

        def weight(words, gram, n=n):
            holding = sum(any(gram in grams(text.split(), n) for text in texts) for texts in REFERENCES)
            return grams(words, n).count(gram) * math.log(len(REFERENCES) / max(1, holding))

        for text in references:
            s = text.split()
            over = (
                [weight(c, gram) for gram in set(grams(c, n))],
                [weight(s, gram) for gram in set(grams(s, n))],
            )
            norm = math.sqrt(sum(x * x for x in over[0])) * math.sqrt(sum(x * x for x in over[1]))
            if norm:
                product = sum(
                    min(weight(c, gram), weight(s, gram)) * weight(s, gram) for gram in set(grams(s, n))
                )
                total += math.exp(-((len(c) - len(s)) ** 2) / 72) * product / norm
    return 10 * total / 4 / len(references)


@pytest.mark.parametrize("references", REFERENCES)
def test_it_is_the_papers_score(references):
    frequency = document_frequency([[text.split() for text in texts] for texts in REFERENCES])
    found = [cider_d(one.split(), [text.split() for text in references], frequency, 4) for one in CANDIDATES]
    assert found == pytest.approx([slow_cider_d(one, references) for one in CANDIDATES], rel=1e-9, abs=1e-12)
    assert max(found) > 0


def test_it_is_the_published_scorers():
    scorer = pytest.importorskip("pycocoevalcap.cider.cider").Cider()
    frequency = document_frequency([[text.split() for text in texts] for texts in REFERENCES])
    said = dict(enumerate([CANDIDATES[0], CANDIDATES[1], CANDIDATES[2], CANDIDATES[3]]))
    _, theirs = scorer.compute_score(dict(enumerate(REFERENCES)), {key: [text] for key, text in said.items()})
    ours = [cider_d(said[i].split(), [text.split() for text in REFERENCES[i]], frequency, 4) for i in said]
    assert ours == pytest.approx(theirs.tolist(), rel=1e-6)


def test_words_are_compared_without_case_punctuation_and_prompt():
    assert words_of(" A picture of the Cook's hat: food, 2 tools.") == [
        "the",
        "cook's",
        "hat",
        "food",
        "2",
        "tools",
    ]
    reward = reward_of([["A dog.", "A picture of dogs"], ["a cat"]])
    assert reward.pictures == 2
    assert reward.frequency[("a",)] == 2
    assert reward.frequency[("dogs",)] == 1
