"""Unit vectors of a cache's field, a chunk at a time, and exact search over them. Not for FAISS: see `index.py`."""

import dataclasses
from collections.abc import Iterator

import numpy as np
from jaxtyping import Float, Int

from teachercache.cache import store
from teachercache.core.errors import UserError

CHUNK_BYTES = 1 << 27  # of float32 at once: 65,536 rows of 512


@dataclasses.dataclass(frozen=True)
class Vectors:
    """The usable vectors of a field. `stored` [rows, dim], [rows, texts, dim] or [rows, views, dim] is no copy."""

    stored: np.ndarray
    ids: Int[np.ndarray, " n"]  # which can be used, in order: a row, or row * texts + k
    per_row: int  # ids that a row has: its texts, else 1
    texts: bool = False  # whether the second axis is of texts, each with an id of its own

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def dim(self) -> int:
        """How wide a vector is."""
        return self.stored.shape[-1]

    def take(self, ids: Int[np.ndarray, " n"]) -> Float[np.ndarray, "n dim"]:
        """Unit vectors of some ids."""
        return unit(self.stored[np.divmod(ids, self.per_row)] if self.texts else self.stored[ids])


def vector_fields(cache: store.Cache) -> list[str]:
    """Fields of a cache that hold one vector a row, view or text."""
    return [field.name for field in cache.meta.spec.fields if field.is_vector]


def default_field(cache: store.Cache) -> str:
    """Return the vector field per image, or the one per text in a cache without images."""
    spec = cache.meta.spec
    if spec.image_vector or spec.text_vector:
        return spec.image_vector or spec.text_vector
    raise UserError(
        f"no field of {cache.path} holds vectors: build another with `tc build --outputs embeddings`"
    )


def usable_vectors(cache: store.Cache, name: str) -> Vectors:
    """The vectors of a field without rows and texts that cannot be used; UserError where it holds no vectors."""
    names = vector_fields(cache)
    if name not in names:
        what = (
            f"field '{name}' holds no vectors"
            if name in cache.fields
            else f"{cache.path} has no field '{name}'"
        )
        if not names:
            raise UserError(
                f"{what}, none of its fields holds any: build another with `tc build --outputs embeddings`"
            )
        raise UserError(f"{what}: index one with `tc index {cache.path} --field {names[0]}`")
    stored, usable = store.read_field(cache, name), store.read_field(cache, "valid")
    if not cache.fields[name].per_text:
        return Vectors(stored, np.flatnonzero(usable), 1)
    usable = usable[:, None] & store.read_field(cache, "text_valid")
    return Vectors(stored, np.flatnonzero(usable), cache.meta.texts, texts=True)


def unit(stored: np.ndarray) -> Float[np.ndarray, "n dim"]:
    """Vectors [n, dim] in float32 and of length one; of [n, views, dim] the normalised mean of the normalised views."""
    vectors = stored.astype(np.float32)
    vectors /= np.maximum(np.linalg.norm(vectors, axis=-1, keepdims=True), 1e-12)
    return vectors if vectors.ndim == 2 else unit(vectors.mean(axis=1))


def chunks(
    vectors: Vectors, *, start: int = 0
) -> Iterator[tuple[Int[np.ndarray, " n"], Float[np.ndarray, "n dim"]]]:
    """Ids and unit vectors, some CHUNK_BYTES at a time, from the `start`-th usable one on."""
    views = 1 if vectors.texts else int(np.prod(vectors.stored.shape[1:-1]))
    size = max(1, CHUNK_BYTES // (4 * views * vectors.dim))
    for first in range(start, len(vectors), size):
        ids = vectors.ids[first : first + size]
        yield ids, vectors.take(ids)


def exact_search(
    vectors: Vectors, queries: Float[np.ndarray, "q dim"], top: int
) -> tuple[Float[np.ndarray, "q top"], Int[np.ndarray, "q top"]]:
    """Cosine to unit queries, best first, and ids; as many as there are where `top` is more.

    Any number of queries: the scores of some CHUNK_BYTES are in memory at once.
    """
    best = np.empty((len(queries), 0), np.float32), np.empty((len(queries), 0), np.int64)
    for ids, chunk in chunks(vectors):
        size = max(1, CHUNK_BYTES // (4 * len(ids)))
        found = [
            _better(best[0][i : i + size], best[1][i : i + size], queries[i : i + size] @ chunk.T, ids, top)
            for i in range(0, max(1, len(queries)), size)
        ]
        best = np.concatenate([scores for scores, _ in found]), np.concatenate([ids for _, ids in found])
    return best


def _better(
    old_scores: np.ndarray, old_ids: np.ndarray, scores: np.ndarray, ids: np.ndarray, top: int
) -> tuple[np.ndarray, np.ndarray]:
    """The best of what was found before and of a chunk's scores."""
    columns = np.argpartition(scores, -min(top, len(ids)), axis=1)[:, -top:]
    scores = np.concatenate([old_scores, np.take_along_axis(scores, columns, 1)], 1)
    found = np.concatenate([old_ids, ids[columns]], 1)
    order = np.argsort(-scores, axis=1, kind="stable")[:, :top]
    return np.take_along_axis(scores, order, 1), np.take_along_axis(found, order, 1)
