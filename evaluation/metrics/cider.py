"""CIDEr-D (Vedantam et al., 2015) of one caption, for evaluation and for self-critical training.

Captions are sequences of words or token ids; the published scorer's tokenizer is not applied.
"""

import math
from collections import Counter
from collections.abc import Hashable, Iterable, Sequence

LENGTHS, SIGMA = (1, 2, 3, 4), 6.0

Words = Sequence[Hashable]
Ngram = tuple[Hashable, ...]
Counts = Counter[Ngram]


def ngrams(words: Words) -> Counts:
    """Count the n-grams of one to four words."""
    return Counter(tuple(words[i : i + n]) for n in LENGTHS for i in range(len(words) - n + 1))


def document_frequency(references: Iterable[Sequence[Words]]) -> Counts:
    """Count for each n-gram the images with a reference that contains it."""
    return Counter(
        ngram for captions in references for ngram in {ngram for words in captions for ngram in ngrams(words)}
    )


def cider_d(candidate: Words, references: Sequence[Words], frequency: Counts, pictures: int) -> float:
    """Compute the CIDEr-D of a caption: clipped tf-idf cosines of n-grams with a Gaussian penalty on the length.

    Args:
        candidate: The caption.
        references: The reference captions of its image.
        frequency: Document frequencies, from `document_frequency`.
        pictures: Number of images that the frequencies were counted on.

    Returns:
        The mean over n = 1 to 4 and the references, between 0 and 10.
    """
    candidate_weights, total = _weighted(candidate, frequency, pictures), 0.0
    for words in references:
        other = _weighted(words, frequency, pictures)
        penalty = math.exp(-((len(candidate) - len(words)) ** 2) / (2 * SIGMA**2))
        for n in LENGTHS:
            norms = _norm(candidate_weights, n) * _norm(other, n)
            shared = sum(
                min(value, other[ngram]) * other[ngram]
                for ngram, value in candidate_weights.items()
                if len(ngram) == n and ngram in other
            )
            total += penalty * shared / norms if norms else 0.0
    return 10 * total / len(LENGTHS) / len(references)


def _weighted(words: Words, frequency: Counts, pictures: int) -> dict[Ngram, float]:
    """tf-idf of each n-gram; an n-gram without references counts as one in a single image's references."""
    return {
        ngram: count * (math.log(pictures) - math.log(max(1, frequency[ngram])))
        for ngram, count in ngrams(words).items()
    }


def _norm(weights: dict[Ngram, float], n: int) -> float:
    return math.sqrt(sum(value**2 for ngram, value in weights.items() if len(ngram) == n))
