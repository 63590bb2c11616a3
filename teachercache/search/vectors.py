"""Iterate over the unit vectors of a field in chunks, and search them exactly."""

import dataclasses
import shlex
from collections.abc import Iterator

import numpy as np
from jaxtyping import Float, Int

from teachercache.cache import store
from teachercache.core.errors import UserError, closest

CHUNK_BYTES = 1 << 27  # of float32 in memory at once: 65,536 rows of width 512


@dataclasses.dataclass(frozen=True)
class Vectors:
    """The usable vectors of a field.

    Attributes:
        stored: The array [rows, dim], [rows, texts, dim] or [rows, views, dim], not copied.
        ids: The usable ids in order: a row, or row * texts + k for the k-th text.
        per_row: The number of ids of a row: its texts, or 1.
        texts: Whether the second axis holds texts, each with an id of its own.
    """

    stored: np.ndarray
    ids: Int[np.ndarray, " n"]
    per_row: int
    texts: bool = False

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def dim(self) -> int:
        """The width of a vector."""
        return self.stored.shape[-1]

    def take(self, ids: Int[np.ndarray, " n"]) -> Float[np.ndarray, "n dim"]:
        """Return the unit vectors of some ids."""
        return unit(self.stored[np.divmod(ids, self.per_row)] if self.texts else self.stored[ids])


def vector_fields(cache: store.Cache) -> list[str]:
    """Return the fields of a cache with one vector per row, view or text."""
    return [field.name for field in cache.meta.spec.fields if field.is_vector]


def default_field(cache: store.Cache) -> str:
    """Return the vector field per image, or the one per text in a cache without images."""
    spec = cache.meta.spec
    if spec.image_vector or spec.text_vector:
        return spec.image_vector or spec.text_vector
    raise UserError(
        f"no field of {cache.path} holds vectors: build another with `tc build --outputs embeddings`"
    )


def vector_field(cache: store.Cache, name: str | None) -> str:
    """Return the name of a vector field, for None the default; raise UserError if it holds no vectors."""
    name = default_field(cache) if name is None else name
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
        hint = closest(name, names)
        words = ["tc", "index", str(cache.path), "--field", names[0]]
        raise UserError(f"{what}: {hint}index one with `{shlex.join(words)}`")
    return name


def usable_vectors(cache: store.Cache, name: str) -> Vectors:
    """Return the vectors of a field without unusable rows and texts; raise UserError if it holds no
    vectors.
    """
    name = vector_field(cache, name)
    stored, usable = store.read_field(cache, name), store.read_field(cache, "valid")
    if not cache.fields[name].per_text:
        return Vectors(stored, np.flatnonzero(usable), 1)
    usable = usable[:, None] & store.read_field(cache, "text_valid")
    return Vectors(stored, np.flatnonzero(usable), cache.meta.texts, texts=True)


def unit(stored: np.ndarray) -> Float[np.ndarray, "n dim"]:
    """Normalize vectors [n, dim] to unit length in float32; for [n, views, dim] return the normalized mean
    of the normalized views.
    """
    vectors = stored.astype(np.float32)
    vectors /= np.maximum(np.linalg.norm(vectors, axis=-1, keepdims=True), 1e-12)
    return vectors if vectors.ndim == 2 else unit(vectors.mean(axis=1))


def chunks(
    vectors: Vectors, *, start: int = 0
) -> Iterator[tuple[Int[np.ndarray, " n"], Float[np.ndarray, "n dim"]]]:
    """Yield ids and unit vectors, about CHUNK_BYTES at a time, from the `start`-th usable vector on."""
    views = 1 if vectors.texts else int(np.prod(vectors.stored.shape[1:-1]))
    size = max(1, CHUNK_BYTES // (4 * views * vectors.dim))
    for first in range(start, len(vectors), size):
        ids = vectors.ids[first : first + size]
        yield ids, vectors.take(ids)


def exact_search(
    vectors: Vectors, queries: Float[np.ndarray, "q dim"], top: int
) -> tuple[Float[np.ndarray, "q top"], Int[np.ndarray, "q top"]]:
    """Return the `top` highest cosines to unit queries, best first, and their ids; fewer if there are fewer.

    The scores of about CHUNK_BYTES are in memory at once, for any number of queries.
    """
    best = np.empty((len(queries), 0), np.float32), np.empty((len(queries), 0), np.int64)
    for ids, chunk in chunks(vectors):
        size = max(1, CHUNK_BYTES // (4 * len(ids)))
        merged = [
            _better(best[0][i : i + size], best[1][i : i + size], queries[i : i + size] @ chunk.T, ids, top)
            for i in range(0, max(1, len(queries)), size)
        ]
        best = np.concatenate([scores for scores, _ in merged]), np.concatenate([ids for _, ids in merged])
    return best


def _better(
    old_scores: np.ndarray, old_ids: np.ndarray, scores: np.ndarray, ids: np.ndarray, top: int
) -> tuple[np.ndarray, np.ndarray]:
    """Merge the best scores so far with those of a chunk."""
    columns = np.argpartition(scores, -min(top, len(ids)), axis=1)[:, -top:]
    scores = np.concatenate([old_scores, np.take_along_axis(scores, columns, 1)], 1)
    candidates = np.concatenate([old_ids, ids[columns]], 1)
    order = np.argsort(-scores, axis=1, kind="stable")[:, :top]
    return np.take_along_axis(scores, order, 1), np.take_along_axis(candidates, order, 1)
