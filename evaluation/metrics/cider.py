"""CIDEr-D (Vedantam et al., 2015) of one caption, for those who score captions and those who are trained by the score.

Not the published scorer's tokenizer: words come as they are given.
"""

import math
from collections import Counter
from collections.abc import Hashable, Iterable, Sequence

LENGTHS, SIGMA = (1, 2, 3, 4), 6.0

Words = Sequence[Hashable]


def ngrams(words: Words) -> Counter:
    """How often each run of one to four words occurs."""
    return Counter(tuple(words[i : i + n]) for n in LENGTHS for i in range(len(words) - n + 1))


def document_frequency(references: Iterable[Sequence[Words]]) -> Counter:
    """In how many pictures' references each run of words occurs."""
    return Counter(
        ngram for captions in references for ngram in {ngram for words in captions for ngram in ngrams(words)}
    )


def cider_d(candidate: Words, references: Sequence[Words], frequency: Counter, pictures: int) -> float:
    """CIDEr-D of a caption, 0 to 10, mean over n = 1 to 4 and references; `frequency` of `pictures` reference sets.

    Clipped tf-idf cosines of n-grams times a penalty on other lengths.
    """
    own, total = _weighted(candidate, frequency, pictures), 0.0
    for words in references:
        other = _weighted(words, frequency, pictures)
        penalty = math.exp(-((len(candidate) - len(words)) ** 2) / (2 * SIGMA**2))
        for n in LENGTHS:
            norms = _norm(own, n) * _norm(other, n)
            shared = sum(
                min(value, other[ngram]) * other[ngram]
                for ngram, value in own.items()
                if len(ngram) == n and ngram in other
            )
            total += penalty * shared / norms if norms else 0.0
    return 10 * total / len(LENGTHS) / len(references)


def _weighted(words: Words, frequency: Counter, pictures: int) -> dict[tuple, float]:
    """tf-idf of each n-gram; one that no reference has is as rare as one that a single picture's have."""
    return {
        ngram: count * (math.log(pictures) - math.log(max(1, frequency[ngram])))
        for ngram, count in ngrams(words).items()
    }


def _norm(weights: dict[tuple, float], n: int) -> float:
    return math.sqrt(sum(value**2 for ngram, value in weights.items() if len(ngram) == n))
