"""Check the indexes beside a cache: their bytes, their rows and some of their vectors."""

from typing import Any

import numpy as np

from teachercache.cache import store
from teachercache.core.errors import UserError
from teachercache.search.index_files import (
    IndexRecord,
    check_index,
    index_command,
    index_path,
    is_unfinished,
    read_index,
    read_record,
    record_path,
    wrong_bytes,
)
from teachercache.search.vectors import Vectors, usable_vectors, vector_fields

LEAST_COSINE = 0.999  # of a vector in an index, in half precision, to the one in the cache
SAMPLES = 64


def damaged_indexes(cache: store.Cache, *, compare: bool) -> dict[str, dict[str, str]]:
    """Return the indexes of a cache that cannot be used, with the `reason` and the `command` that makes them again.

    Args:
        cache: The cache.
        compare: Also compare rows and vectors with those of the cache, which is complete and undamaged.
    """
    found = {}
    for field in vector_fields(cache):
        path = index_path(cache, field)
        if is_unfinished(path) or not (path.exists() or record_path(path).exists()):
            continue
        record = read_record(cache, field)
        reason = _wrong(cache, field, record, compare=compare)
        if reason:
            command = index_command(cache, field, record).removeprefix("run `").removesuffix("`")
            found[str(path)] = {"reason": reason, "command": command}
    return found


def _wrong(cache: store.Cache, field: str, record: IndexRecord | None, *, compare: bool) -> str:
    """Return what is wrong with an index, or an empty string."""
    path = index_path(cache, field)
    if not path.exists():
        return "is missing"
    if record is None:
        return f"{record_path(path).name} is missing or damaged"
    wrong = wrong_bytes(path, record, whole=True)
    if wrong or not compare:
        return wrong
    try:
        check_index(cache, field)
        index = read_index(cache, record)
    except UserError as error:
        return str(error).removeprefix(f"{path} ").partition(": run `")[0]
    return _other_vectors(index, record, usable_vectors(cache, field))


def _other_vectors(index: Any, record: IndexRecord, vectors: Vectors) -> str:
    """Return how the vectors of an index differ from those of its cache, or an empty string."""
    import faiss

    if record.kind == "ivf":
        lists = index.invlists
        ids = np.concatenate(
            [
                faiss.rev_swig_ptr(lists.get_ids(i), lists.list_size(i)).copy()
                for i in range(index.nlist)
                if lists.list_size(i)
            ]
        )
    else:
        ids = faiss.vector_to_array(index.id_map)
    if not np.array_equal(np.sort(ids), vectors.ids):
        return "holds other rows than the cache"
    places = np.linspace(0, len(ids) - 1, min(SAMPLES, len(ids))).round().astype(int)
    stored = vectors.take(np.sort(ids)[places] if record.kind == "ivf" else ids[places])
    if record.kind == "ivf":  # the list of a stored vector is the first that a search for it reads
        cosines = index.search(stored, 1)[0][:, 0]
    else:
        inner = np.stack([index.index.reconstruct(int(place)) for place in places])
        cosines = (inner * stored).sum(1) / np.maximum(np.linalg.norm(inner, axis=1), 1e-12)
    return "" if (cosines >= LEAST_COSINE).all() else "holds other vectors than the cache"
