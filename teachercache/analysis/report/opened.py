"""Open a cache for analysis: its usable vectors, their rows, and the sections that it cannot have."""

import dataclasses
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from teachercache.analysis.neighbors import take
from teachercache.cache import store
from teachercache.core.errors import UserError
from teachercache.data.manifest import Manifest
from teachercache.search.vectors import Vectors, usable_vectors

ALL_PAIRS = 2_500_000_000  # the cosines that one section may compute: all pairs of 50,000 rows
MAPPED = 20_000  # rows on the map


@dataclasses.dataclass(frozen=True)
class Subject:
    """A cache opened for analysis. A row is represented by its image, or without images by its first text.

    Attributes:
        cache: The cache.
        manifest: Its rows.
        pictures: The usable image vectors.
        texts: Every usable text vector.
        firsts: The first usable text of each row.
        left_out: Sections that are missing, with the reason.
    """

    cache: store.Cache
    manifest: Manifest
    pictures: Vectors | None
    texts: Vectors | None
    firsts: Vectors | None
    left_out: dict[str, str]

    @property
    def main(self) -> Vectors:
        """One vector per row."""
        vectors = self.firsts if self.pictures is None else self.pictures
        assert vectors is not None
        return vectors

    @property
    def rows(self) -> Int[np.ndarray, " n"]:
        """The row of each vector of `main`."""
        return rows_of(self.main)

    @property
    def both(self) -> bool:
        """Whether there are images and texts in one space."""
        return self.pictures is not None and self.texts is not None and "pairs" not in self.left_out


def rows_of(vectors: Vectors) -> Int[np.ndarray, " n"]:
    """Return the row of each id."""
    return vectors.ids // vectors.per_row


def open_subject(path: Any) -> Subject:
    """Open a complete cache; raise UserError if it holds nothing to analyze."""
    cache = store.open_complete(path)
    names = (cache.meta.spec.image_vector, cache.meta.spec.text_vector)
    if not any(names):
        raise UserError(
            f"{path} holds no embeddings: build one with `tc build --outputs embeddings`, to another --out"
        )
    manifest = store.cached_manifest(cache)
    opened = [usable_vectors(cache, name) if name else None for name in names]
    pictures, texts = (vectors if vectors is not None and len(vectors) > 1 else None for vectors in opened)
    if pictures is None and texts is None:
        raise UserError(f"{path} has fewer than two usable vectors: see `tc info {path}`")
    left_out: dict[str, str] = {}
    why = "pictures" if pictures is None else "texts"
    if pictures is None or texts is None:
        left_out["pairs"] = f"the cache has no {why} that can be used"
    elif pictures.dim != texts.dim:
        left_out["pairs"] = f"pictures are {pictures.dim} and texts {texts.dim} wide: two spaces"
    firsts = texts and dataclasses.replace(
        texts, ids=texts.ids[np.unique(rows_of(texts), return_index=True)[1]]
    )
    return Subject(cache, manifest, pictures, texts, firsts, left_out)


def draw(count: int, most: int, *, seed: int = 0) -> Int[np.ndarray, " n"]:
    """Return `most` random positions out of `count`, in order; all if there are fewer."""
    if count <= most:
        return np.arange(count)
    return np.sort(np.random.default_rng(seed).choice(count, most, replace=False))


def asked(queries: int, candidates: int) -> Int[np.ndarray, " q"]:
    """Return the positions of the queries for a number of candidates: all, or as many as ALL_PAIRS allows."""
    return draw(queries, max(100, ALL_PAIRS // max(1, candidates)))


def vectors_at(
    vectors: Vectors, rows: Int[np.ndarray, " q"]
) -> tuple[np.ndarray, Float[np.ndarray, "n dim"]]:
    """Return which of some rows have a vector, and their unit vectors. There is one vector per row; rows
    ascend.
    """
    own_rows = rows_of(vectors)
    places = np.minimum(np.searchsorted(own_rows, rows), len(own_rows) - 1)
    present = np.flatnonzero(own_rows[places] == rows)
    return present, take(vectors, places[present])
