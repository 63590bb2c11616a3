"""Cluster rows, and find keywords that describe a cluster."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float

from teachercache.analysis.neighbors import Rows, as_vectors, take
from teachercache.core.errors import UserError

FITTED = 20_000  # rows that the centroids are fitted to
KEYWORD_TEXTS = 300  # texts of a cluster that its keywords come from


def fit_centers(rows: Rows, count: int = 0, *, seed: int = 0) -> Float[np.ndarray, "c dim"]:
    """Return the centroids of mini-batch k-means over unit vectors.

    With `count` 0 there is about one cluster per twenty rows, at most 24.
    """
    try:
        from sklearn.cluster import MiniBatchKMeans
    except ImportError as error:
        raise UserError("clusters need scikit-learn: pip install 'teachercache[analyze]'") from error
    vectors = as_vectors(rows)
    random = np.random.default_rng(seed)
    sample = np.sort(random.choice(len(vectors), min(FITTED, len(vectors)), replace=False))
    count = min(count or int(np.clip(np.sqrt(len(vectors) / 20), 2, 24)), len(sample))
    model = MiniBatchKMeans(count, random_state=seed, n_init=3, batch_size=2048)
    return model.fit(take(vectors, sample)).cluster_centers_


def keywords(texts: Sequence[str], count: int = 3) -> list[str]:
    """Return the most important words and word pairs by YAKE, or [] if there are no words.

    YAKE uses English stop words and reads the texts as sentences of one document.
    """
    try:
        import yake
    except ImportError as error:
        raise UserError("keywords need yake: pip install 'teachercache[analyze]'") from error
    document = ". ".join(text.strip().rstrip(".") for text in texts[:KEYWORD_TEXTS] if text.strip())
    phrases = yake.KeywordExtractor(lan="en", n=2, top=3 * count, dedupLim=0.7).extract_keywords(document)
    kept: list[str] = []
    for phrase, _ in phrases:
        words = {word.lower() for word in phrase.split()}
        if not any(words & {word.lower() for word in other.split()} for other in kept):
            kept.append(phrase)
    return kept[:count]
