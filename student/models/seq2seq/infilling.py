"""Corrupt token ids with BART's text infilling (Lewis et al., 2020): each masked span becomes one mask token.

As in BART's released code, spans are measured in words. The budget is a share of the words, rounded up. Span
lengths are drawn from a Poisson distribution until they use up the budget; the last one is cut to fit. A span
of length 0 inserts a mask between two tokens. A span that starts inside another merges with it, and no span
exceeds its text.
"""

import math
from collections.abc import Sequence

import numpy as np

LENGTH = 3.0  # mean words per span


def draw_lengths(
    words: int, random: np.random.Generator, *, share: float, length: float = LENGTH
) -> np.ndarray:
    """Draw span lengths in words, including zeros, with the sum ceil(share * words).

    Args:
        words: Words of the text.
        random: The random generator.
        share: Share of the words to mask.
        length: Mean words per span.
    """
    budget = math.ceil(round(share * words, 9))
    lengths = np.empty(0, int)
    while lengths.sum() < budget:
        lengths = np.append(lengths, random.poisson(length, budget))
    if not budget:
        return lengths
    used = lengths.cumsum()
    last = int(np.argmax(used >= budget))
    lengths = lengths[: last + 1].copy()
    lengths[last] -= used[last] - budget
    return lengths


def infill(
    ids: Sequence[int],
    starts: Sequence[bool] | np.ndarray,
    mask: int,
    random: np.random.Generator,
    *,
    share: float,
    length: float = LENGTH,
) -> list[int]:
    """Return the tokens of a text with masks in place of spans.

    Args:
        ids: Token ids, without begin and end tokens.
        starts: Which tokens begin a word; the first token always does.
        mask: The id of the mask token.
        random: The random generator.
        share: Share of the words to mask.
        length: Mean words per span.
    """
    # The first token of each word
    first = np.flatnonzero(np.asarray(starts, bool) | (np.arange(len(ids)) == 0))
    words = len(first)
    lengths = draw_lengths(words, random, share=share, length=length)
    spans = lengths[lengths > 0]
    positions = random.permutation(words)[: len(spans)]
    begins = np.zeros(words, bool)
    inside = np.zeros(words, bool)  # words after the first word of a span
    begins[positions] = True
    for position, size in zip(positions, spans, strict=True):
        inside[position + 1 : position + size] = True
    ends = np.append(first[1:], len(ids))
    masked: list[int] = []
    for word in range(words):
        if begins[word] and not inside[word]:
            masked.append(mask)
        elif not inside[word]:
            masked += [int(token) for token in ids[first[word] : ends[word]]]
    for _ in range(len(lengths) - len(spans)):
        masked.insert(int(random.integers(len(masked) + 1)), mask)
    return masked
