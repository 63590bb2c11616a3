"""The three anchors of zero-shot SNLI-VE: 3-means of cosines of image and hypothesis (CLIP-TD, section 4.2.1)."""

import numpy as np
from jaxtyping import Float

from teachercache.core.errors import UserError


def three_means(cosines: Float[np.ndarray, " n"]) -> Float[np.ndarray, " 3"] | None:
    """Return the centers of k-means with k = 3, lowest first: contradiction, neutral, entailment.

    Args:
        cosines: One-dimensional values; the clustering runs in their precision.

    Returns:
        The centers, or None if there are fewer than three distinct values.

    Raises:
        UserError: If scikit-learn is not installed.
    """
    if len(np.unique(cosines)) < 3:
        return None
    try:
        from sklearn.cluster import KMeans
    except ImportError as error:
        raise UserError(
            "the anchors of SNLI-VE need scikit-learn: pip install 'teachercache[eval]'"
        ) from error
    clusters = KMeans(n_clusters=3, n_init=10, random_state=0).fit(cosines[:, None])
    return np.sort(clusters.cluster_centers_[:, 0])
