"""A cache that is served: its rows, vector fields, filters and pictures, and its teacher once a query needs it."""

import dataclasses
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float

from teachercache.cache import store
from teachercache.core.errors import UserError
from teachercache.data.manifest import Manifest
from teachercache.search.filtered import Searcher, open_searcher
from teachercache.search.query import encode_query, picture_field, row_vector
from teachercache.search.vectors import default_field, usable_vectors
from teachercache.serve.facets import LISTED, Facet, find_facets
from teachercache.serve.pictures import Pictures

if TYPE_CHECKING:
    from PIL.Image import Image

    from teachercache.teachers.teacher import Teacher


class Searchers:
    """The vector fields of a cache, each opened by the first search of it."""

    def __init__(self, cache: store.Cache) -> None:
        self.cache, self.lock = cache, threading.Lock()
        self.opened: dict[str, Searcher] = {}

    def get(self, field: str) -> Searcher:
        """Return an opened field; raise UserError if it holds no vectors or needs an index."""
        with self.lock:
            if field not in self.opened:
                self.opened[field] = open_searcher(self.cache, field)
            return self.opened[field]


class LiveTeacher:
    """The teacher of a cache, loaded by the first text or picture. It encodes one query at a time."""

    def __init__(self, cache: store.Cache, named: str | None = None) -> None:
        self.cache, self.named, self.lock = cache, named, threading.Lock()
        self.teacher: Teacher | None = None

    def load(self) -> "Teacher":
        """Load the teacher, once; raise UserError if it cannot be loaded."""
        with self.lock:
            return self._load()

    def encode(
        self, field: str, *, text: str | None, pictures: "list[Image]"
    ) -> list[Float[np.ndarray, " dim"]]:
        """Return the vectors of a text and of pictures, see `encode_query`."""
        with self.lock:
            return encode_query(self._load(), self.cache, field, text=text, pictures=pictures)

    def _load(self) -> "Teacher":
        if self.teacher is None:
            from teachercache.teachers.of_cache import load_teacher

            self.teacher = load_teacher(self.cache, self.named)
        return self.teacher


@dataclasses.dataclass(frozen=True)
class Served:
    """One cache with all that its page needs. Keys and texts stay in the Arrow table of the manifest."""

    cache: store.Cache
    manifest: Manifest
    facets: list[Facet]
    searchers: Searchers
    live: LiveTeacher
    pictures: Pictures

    def row_vector(self, field: str, row: int) -> Float[np.ndarray, " dim"]:
        """Return the stored vector that represents a row in a search of a field."""
        own = picture_field(self.cache, field)
        searched = own == field
        vectors = self.searchers.get(field).vectors if searched else usable_vectors(self.cache, own)
        return row_vector(self.cache, vectors, row, self.manifest.table["key"][row].as_py())

    def row_of(self, key: str) -> int:
        """Return the row of a key, -1 if there is none."""
        import pyarrow as pa
        import pyarrow.compute as pc

        return pc.index(self.manifest.table["key"], pa.scalar(key, pa.string())).as_py()


def open_served(path: str | Path, teacher: str | None = None) -> Served:
    """Open a complete cache; raise UserError in one line if it cannot be searched.

    Args:
        path: The cache.
        teacher: The teacher that the user names, see `load_teacher`.
    """
    cache = store.open_complete(path)
    manifest = store.cached_manifest(cache)
    manifest = dataclasses.replace(manifest, table=manifest.table.combine_chunks())  # rows are taken faster
    searchers = Searchers(cache)
    searchers.get(default_field(cache))
    return Served(
        cache, manifest, find_facets(manifest), searchers, LiveTeacher(cache, teacher), Pictures(manifest)
    )


def fields_of(cache: store.Cache) -> dict[str, str]:
    """Return the fields that the page searches, as "pictures" and "texts"."""
    spec = cache.meta.spec
    fields = {"pictures": spec.image_vector, "texts": spec.text_vector if cache.meta.texts else ""}
    return {name: field for name, field in fields.items() if field}


def takes(cache: store.Cache) -> dict[str, list[str]]:
    """Return what each searched field can be queried by, besides rows: "text" and "picture"."""
    spec = cache.meta.spec
    sources = {"text": spec.text_vector, "picture": spec.image_vector}
    reads = {"text": "text" in spec.inputs, "picture": "image" in spec.inputs}
    return {
        name: [
            source
            for source, vector in sources.items()
            if vector and reads[source] and spec.field(vector).shape == spec.field(field).shape
        ]
        for name, field in fields_of(cache).items()
    }


def describe(served: Served, number: int) -> dict[str, Any]:
    """Return what the page shows of a cache before the first query."""
    meta = served.cache.meta
    name = served.cache.path.name.removesuffix(".zarr")
    return {
        "cache": number,
        "name": name,
        "teacher": Path(meta.spec.name).name,  # of a run or a folder, the name without its parents
        "data": meta.data,
        "rows": meta.rows,
        "pictures": served.manifest.has_images,
        "takes": takes(served.cache),
        "views": meta.views,
        "facets": [
            {
                "name": facet.name,
                "values": facet.values.slice(0, LISTED).to_pylist(),
                "counts": facet.counts[:LISTED].tolist(),
                "more": max(0, len(facet.values) - LISTED),
            }
            for facet in served.facets
        ],
    }


def check_number(served: list[Served], number: int, row: int) -> tuple[Served, int]:
    """Return a cache by its number, and a row of it; raise UserError if there is none."""
    if not 0 <= number < len(served) or not 0 <= row < len(served[number].manifest):
        raise UserError(f"there is no row {row} of cache {number}")
    return served[number], row
