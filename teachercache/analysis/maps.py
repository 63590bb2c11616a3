"""Project vectors to two dimensions by PCA, or by UMAP if it is installed."""

import numpy as np
from jaxtyping import Float

from teachercache.analysis import measures
from teachercache.analysis.measures import Moments
from teachercache.core.errors import UserError

KINDS = ("pca", "umap")


def flatten(
    x: Float[np.ndarray, "n dim"], moments: Moments | None = None, *, kind: str = "pca"
) -> Float[np.ndarray, "n 2"]:
    """Return two coordinates of unit vectors. For a sample of rows, `moments` of all rows define the axes
    of PCA.
    """
    if kind == "umap":
        return _umap(x)
    statistics = measures.moments([x]) if moments is None else moments
    axes = measures.principal_axes(statistics)
    placed = (x - statistics.total / statistics.count) @ axes
    return np.pad(placed, ((0, 0), (0, 2 - placed.shape[1])))


def _umap(x: np.ndarray) -> np.ndarray:
    try:
        import umap
    except ImportError as error:
        raise UserError(
            "--map umap needs umap-learn: pip install 'teachercache[analyze]', or leave --map away"
        ) from error
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # UMAP warns that a seed implies one thread
        near = min(15, len(x) - 1)
        return umap.UMAP(n_neighbors=near, metric="cosine", random_state=0).fit_transform(x)
