"""FAISS over a field of a cache, and search in it. Ids are the cache's rows; rows that cannot be used are left out."""

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from teachercache import store
from teachercache.names import UserError
from teachercache.paths import write_whole
from teachercache.spec import fingerprint

KINDS = ("auto", "flat", "ivf", "hnsw")
FLAT_UP_TO = 50_000  # FEASIBILITY: above it exact search drops under some hundred queries a second


def index_path(cache: store.Cache, field: str) -> Path:
    """Where the index of a field lies: beside the cache."""
    return cache.path.with_name(f"{cache.path.name.removesuffix('.zarr')}.{field}.faiss")


def build_index(cache: store.Cache, *, field: str = "image_emb", kind: str = "auto") -> tuple[Path, dict[str, Any]]:
    """Build and write the index of a vector field by inner product of unit vectors; its path and facts."""
    faiss = _faiss()
    if kind not in KINDS:
        raise UserError(f"--kind {kind}: choose from {', '.join(KINDS)}")
    vectors, ids = unit_vectors(cache, field)
    if not len(vectors):
        raise UserError(f"no usable row in {cache.path}: see {cache.path / 'quarantine.jsonl'}")
    if kind == "auto":
        kind = "flat" if len(vectors) <= FLAT_UP_TO else "ivf"
    lists = min(int(4 * np.sqrt(len(vectors))), len(vectors))
    factory = {"flat": "Flat", "ivf": f"IVF{lists},SQfp16", "hnsw": "HNSW32"}[kind]
    index = faiss.index_factory(vectors.shape[1], f"IDMap2,{factory}", faiss.METRIC_INNER_PRODUCT)
    index.train(vectors)
    index.add_with_ids(vectors, ids)
    path = index_path(cache, field)
    partial = path.with_name(path.name + ".partial")
    faiss.write_index(index, str(partial))
    os.replace(partial, path)
    facts = {"field": field, "kind": kind, "vectors": len(vectors), "cache": fingerprint(cache.meta)}
    write_whole(path.with_name(path.name + ".json"), json.dumps(facts) + "\n")
    return path, facts


def unit_vectors(cache: store.Cache, name: str) -> tuple[Float[np.ndarray, "n dim"], Int[np.ndarray, " n"]]:
    """Usable vectors of a field, normalised, float32; their ids: row, or row * texts + k for texts."""
    check_field(cache, name)
    values = store.read_field(cache, name)
    usable = store.read_field(cache, "valid")
    if cache.fields[name].per == "text":
        usable = (usable[:, None] & store.read_field(cache, "text_valid")).reshape(-1)
        values = values.reshape(-1, values.shape[-1])
    ids = np.flatnonzero(usable)
    vectors = np.asarray(values[ids], dtype=np.float32)
    norms = np.linalg.norm(vectors, axis=1, keepdims=True)
    return vectors / np.maximum(norms, 1e-12), ids


def check_field(cache: store.Cache, name: str) -> None:
    """UserError where a cache has no vectors of that name, ending in a command on those that it has."""
    vectors = [field.name for field in cache.fields.values() if len(field.shape) == 1]
    if name not in vectors:
        what = f"field '{name}' holds no vectors" if name in cache.fields else f"{cache.path} has no field '{name}'"
        raise UserError(f"{what}: index one with `tc index {cache.path} --field {(vectors or ['image_emb'])[0]}`")


def check_index(cache: store.Cache, field: str) -> dict[str, Any]:
    """The facts of the index beside a cache; UserError where it is missing or of another build."""
    path = index_path(cache, field)
    command = f"run `tc index {cache.path} --field {field}`"
    try:
        facts = json.loads(path.with_name(path.name + ".json").read_text())
    except FileNotFoundError as error:
        raise UserError(f"no index of '{field}' yet: {command}") from error
    except ValueError as error:
        raise UserError(f"{path}.json is damaged: {command}") from error
    if facts["cache"] != fingerprint(cache.meta):
        raise UserError(f"{path} was made for another build of this cache: {command}")
    return facts


def search(cache: store.Cache, query: Float[np.ndarray, " dim"], *, field: str = "image_emb",
           top: int = 10) -> list[tuple[int, float]]:  # fmt: skip
    """The `top` nearest ids by cosine, best first; uses the index beside the cache, which must be of this cache."""
    faiss = _faiss()
    facts = check_index(cache, field)
    try:
        index = faiss.read_index(str(index_path(cache, field)))
    except RuntimeError as error:
        raise UserError(f"the index is damaged or gone: run `tc index {cache.path} --field {field}`") from error
    if facts["kind"] == "ivf":
        faiss.extract_index_ivf(index).nprobe = 8
    query = (query / max(float(np.linalg.norm(query)), 1e-12)).astype(np.float32)[None]
    scores, ids = index.search(query, min(top, index.ntotal))
    return [(int(i), float(score)) for i, score in zip(ids[0], scores[0], strict=True) if i >= 0]


def _faiss() -> Any:
    try:
        import faiss
    except ImportError as error:
        raise UserError("search needs FAISS: pip install 'teachercache[cpu]' (or [gpu])") from error
    return faiss
