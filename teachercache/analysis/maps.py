"""Where rows lie on a map of two axes: PCA, or UMAP where it is installed. Draws nothing."""

from collections.abc import Mapping

import numpy as np
from jaxtyping import Float, Int

from teachercache.analysis import measures
from teachercache.analysis.measures import Moments
from teachercache.analysis.subject import Subject, vectors_at
from teachercache.names import UserError

KINDS = ("pca", "umap")


def flatten(
    x: Float[np.ndarray, "n dim"], moments: Moments | None = None, *, kind: str = "pca"
) -> Float[np.ndarray, "n 2"]:
    """Two coordinates of unit vectors; PCA's axes are of `moments` (of all rows), where x are some of them."""
    if kind == "umap":
        return _umap(x)
    known = measures.moments([x]) if moments is None else moments
    axes = measures.principal_axes(known)
    placed = (x - known.total / known.count) @ axes
    return np.pad(placed, ((0, 0), (0, 2 - placed.shape[1])))


def _umap(x: np.ndarray) -> np.ndarray:
    try:
        import umap
    except ImportError as error:
        raise UserError(
            "--map umap needs umap-learn: pip install 'teachercache[umap]', or leave --map away"
        ) from error
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it says that a seed means one thread
        near = min(15, len(x) - 1)
        return umap.UMAP(n_neighbors=near, metric="cosine", random_state=0).fit_transform(x)


def make_maps(
    subject: Subject, rows: Int[np.ndarray, " n"], moments: Mapping[str, Moments], *, kind: str = "pca"
) -> dict[str, Float[np.ndarray, "n 2"]]:
    """Coordinates of rows on each map: pictures, texts, and both together twice; nan where a row has no such vector."""
    found = {"pictures": subject.pictures, "texts": subject.firsts}
    vectors = {name: vectors_at(part, rows) for name, part in found.items() if part is not None}
    maps = {}
    for name, (there, x) in vectors.items():
        maps[name] = np.full((len(rows), 2), np.nan)
        maps[name][there] = flatten(x, moments.get(name), kind=kind)
    if subject.both:
        (at, x), (text_at, y) = vectors["pictures"], vectors["texts"]
        placed = flatten(np.concatenate([x, y]), moments["pictures"] + moments["texts"], kind=kind)
        for name, there, part in (("both", at, placed[: len(x)]), ("both_texts", text_at, placed[len(x) :])):
            maps[name] = np.full((len(rows), 2), np.nan)
            maps[name][there] = part
    return maps


def second_map(
    first: Float[np.ndarray, "n 2"], subject: Subject, at: Int[np.ndarray, " n"], *, kind: str = "pca"
) -> Float[np.ndarray, "n 2"]:
    """The same rows (at row at[i] of another cache, -1: nowhere) on a map of that cache, turned to lie on the first."""
    there, x = vectors_at(subject.main, at)
    placed = np.full((len(at), 2), np.nan)
    if len(there) > 2:
        placed[there] = flatten(x, kind=kind)
        known = there[~np.isnan(first[there, 0])]
        if len(known) > 2:
            placed[there] = measures.turn_onto(first[known], placed[known], placed[there])
    return placed
