"""BART's text infilling (Lewis et al., 2020): spans of a text go, each leaves one mask. Knows ids, no tokenizer.

As BART's released code does it: spans are counted in words; a share of the words, rounded up, is the budget; lengths
are drawn from a Poisson distribution until they use it up, the last one cut to fit; a span of no words is a mask put
between two tokens; a span that begins inside of another is one with it, and none goes beyond the end of its text.
"""

import math
from collections.abc import Sequence

import numpy as np

LENGTH = 3.0  # words of a span in the mean


def draw_lengths(
    words: int, random: np.random.Generator, *, share: float, length: float = LENGTH
) -> np.ndarray:
    """Lengths of the spans of a text, zeros among them, that together use up ceil(share * words)."""
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
    starts: Sequence[bool],
    mask: int,
    random: np.random.Generator,
    *,
    share: float,
    length: float = LENGTH,
) -> list[int]:
    """The tokens of a text, without its marks of begin and end, with masks in the place of spans.

    `starts` says which tokens begin a word; the first one does in any case.
    """
    first = np.flatnonzero(np.asarray(starts, bool) | (np.arange(len(ids)) == 0))  # each word's first token
    words = len(first)
    lengths = draw_lengths(words, random, share=share, length=length)
    spans = lengths[lengths > 0]
    places = random.permutation(words)[: len(spans)]
    begins, inside = (
        np.zeros(words, bool),
        np.zeros(words, bool),
    )  # inside: behind the first word of some span
    begins[places] = True
    for place, size in zip(places, spans, strict=True):
        inside[place + 1 : place + size] = True
    ends = np.append(first[1:], len(ids))
    found: list[int] = []
    for word in range(words):
        if begins[word] and not inside[word]:
            found.append(mask)
        elif not inside[word]:
            found += [int(one) for one in ids[first[word] : ends[word]]]
    for _ in range(len(lengths) - len(spans)):
        found.insert(int(random.integers(len(found) + 1)), mask)
    return found
