"""Groups of rows that lie together, and the words that name them. Not for neighbours of single rows."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float

from teachercache.analysis.neighbours import Rows, as_vectors, take
from teachercache.core.errors import UserError

FITTED = 20_000  # rows that centres are found from
KEYWORD_TEXTS = 300  # texts of a cluster that are read for its words


def fit_centres(rows: Rows, count: int = 0, *, seed: int = 0) -> Float[np.ndarray, "c dim"]:
    """Centres of k-means over unit vectors, by mini-batches; `count` 0 is one for some twenty rows, at most 24."""
    try:
        from sklearn.cluster import MiniBatchKMeans
    except ImportError as error:
        raise UserError("clusters need scikit-learn: pip install 'teachercache[analyze]'") from error
    vectors = as_vectors(rows)
    random = np.random.default_rng(seed)
    at = np.sort(random.choice(len(vectors), min(FITTED, len(vectors)), replace=False))
    count = min(count or int(np.clip(np.sqrt(len(vectors) / 20), 2, 24)), len(at))
    model = MiniBatchKMeans(count, random_state=seed, n_init=3, batch_size=2048)
    return model.fit(take(vectors, at)).cluster_centers_


def keywords(texts: Sequence[str], count: int = 3) -> list[str]:
    """The words and pairs of words that YAKE finds to matter most, most important first; [] where there are no words.

    The language is English's stop words; texts are read as sentences of one document.
    """
    try:
        import yake
    except ImportError as error:
        raise UserError("keywords need yake: pip install 'teachercache[analyze]'") from error
    document = ". ".join(text.strip().rstrip(".") for text in texts[:KEYWORD_TEXTS] if text.strip())
    found = yake.KeywordExtractor(lan="en", n=2, top=3 * count, dedupLim=0.7).extract_keywords(document)
    kept: list[str] = []
    for phrase, _ in found:
        words = {word.lower() for word in phrase.split()}
        if not any(words & {word.lower() for word in other.split()} for other in kept):
            kept.append(phrase)
    return kept[:count]
