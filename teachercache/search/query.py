"""Search a cache by a text, an image, the key of a row, or several of them together."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float

from teachercache.cache import store
from teachercache.core.errors import UserError, calling, closest
from teachercache.data.pictures import decode_image, read_regular
from teachercache.data.sample import BadSample
from teachercache.search.index import open_index, search
from teachercache.search.index_files import index_command, index_path, read_record
from teachercache.search.vectors import Vectors, unit, usable_vectors, vector_field

if TYPE_CHECKING:
    from PIL.Image import Image

    from teachercache.teachers.teacher import Inputs, Teacher


def search_cache(
    path: str | Path,
    *,
    text: str | None = None,
    images: tuple[Path, ...] = (),
    keys: tuple[str, ...] = (),
    field: str | None = None,
    top: int = 10,
    teacher: str | None = None,
) -> list[dict[str, Any]]:
    """Return the rows with the nearest images, or texts if there are no images or `field` is a field per
    text.

    The query is the unweighted sum of the unit vectors of text, images and rows: "this picture, but snowy".
    On the demo data cosines to a text and to an image have the same spread (standard deviation .117 and .116
    with clip-lite). Rows given by key are left out of the results, and need no teacher.

    Args:
        path: The cache.
        text: A text to search by.
        images: Image files to search by.
        keys: Keys of rows to search by.
        field: The vector field; None for `default_field`.
        top: The number of results.
        teacher: The teacher that the user names, see `load_teacher`.
    """
    if text is None and not images and not keys:
        raise UserError('give a text, --image FILE or --key KEY: tc search CACHE "a red bird"')
    cache = store.open_complete(path)
    field = vector_field(cache, field)
    opened = open_index(cache, field)
    rows = _rows(cache, keys)
    row_vectors = usable_vectors(cache, picture_field(cache, field)) if rows else None
    vectors = [row_vector(cache, row_vectors, row, key) for key, row in rows.items()] if row_vectors else []
    if text is not None or images:
        from teachercache.teachers.of_cache import (
            load_teacher,  # imported here: a search by key is twice as fast
        )

        pictures = [_read_picture(image) for image in images]
        vectors += encode_query(load_teacher(cache, teacher), cache, field, text=text, pictures=pictures)
    query = sum_of_units(cache, field, vectors)
    hits = _hits(cache, field, opened, query, top + per_row(cache, field) * len(rows))
    return _results(cache, field, hits, rows)[:top]


def sum_of_units(
    cache: store.Cache, field: str, vectors: list[Float[np.ndarray, " dim"]]
) -> Float[np.ndarray, " dim"]:
    """Return the sum of the unit vectors of a query; raise UserError if one has another width than the field."""
    alone = "a text" if cache.fields[field].per_text else "--image FILE or --key KEY"
    if any(len(vector) != cache.fields[field].shape[0] for vector in vectors):
        raise UserError(
            f"{cache.meta.spec.name} has texts and pictures in different spaces: search '{field}' by {alone} alone"
        )
    return np.sum([unit(vector[None])[0] for vector in vectors], axis=0)


def _read_picture(image: Path) -> "Image":
    """Decode the file of `--image`."""
    try:
        return decode_image(read_regular(image))
    except BadSample as error:
        raise UserError(f"--image {image}: {error}") from error


def _hits(
    cache: store.Cache, field: str, opened: Any, query: np.ndarray, top: int
) -> list[tuple[int, float]]:
    """Search; raise UserError with the command that makes the index again if it finds rows that are not there."""
    reason = "it finds rows that the cache does not have"
    try:
        hits = search(opened, query, top=top)
    except RuntimeError as error:  # of faiss
        hits, reason = [(-1, 0.0)], " ".join(str(error).split())[:200]
    if all(0 <= number < cache.meta.rows * per_row(cache, field) for number, _ in hits):
        return hits
    command = index_command(cache, field, read_record(cache, field))
    raise UserError(f"{index_path(cache, field)} is damaged ({reason}): {command}")


def per_row(cache: store.Cache, field: str) -> int:
    """Return the number of ids of a row in the index of a field: its texts, or 1."""
    return cache.meta.texts if cache.fields[field].per_text else 1


def picture_field(cache: store.Cache, field: str) -> str:
    """Return the field that represents a row of the query: its image, or its texts in a cache without
    images.
    """
    return (cache.meta.spec.image_vector if cache.fields[field].per_text else "") or field


def _rows(cache: store.Cache, keys: tuple[str, ...]) -> dict[str, int]:
    """Return the row of each key; raise UserError with the most similar key if there is none."""
    if not keys:
        return {}
    rows = dict(zip(keys, store.join(cache, list(keys)).tolist(), strict=True))
    for key, row in rows.items():
        if row < 0:
            hint = closest(key, store.read_keys(cache)[:100_000])  # difflib would take seconds with more keys
            raise UserError(
                f"{cache.path} has no key '{key}': {hint or 'pass one that `tc search --json` shows'}"
            )
    return rows


def row_vector(cache: store.Cache, vectors: Vectors, row: int, key: str) -> Float[np.ndarray, " dim"]:
    """Return the vector of a row; the mean of the unit vectors of its texts. Raise UserError if it is
    quarantined.

    Args:
        cache: The cache.
        vectors: The usable vectors of the field that represents a row.
        row: The row.
        key: Its key, for the message.
    """
    low, high = np.searchsorted(vectors.ids, [row * vectors.per_row, (row + 1) * vectors.per_row])
    if low < high:
        return vectors.take(vectors.ids[low:high]).mean(axis=0)
    entries = map(json.loads, (cache.path / "quarantine.jsonl").read_text().splitlines())
    reason = next((entry["reason"] for entry in entries if entry["key"] == key), "quarantined")
    raise UserError(
        f"row '{key}' of {cache.path} is unusable ({reason}): pass another --key, or --image FILE"
    )


def encode_query(
    teacher: "Teacher", cache: store.Cache, field: str, *, text: str | None, pictures: "list[Image]"
) -> list[Float[np.ndarray, " dim"]]:
    """Encode the text and the pictures of a query with the teacher of the cache.

    Raises:
        UserError: The teacher cannot encode them, or not into the space of the field.
    """
    import torch

    spec = cache.meta.spec
    queries: list[tuple[str, Inputs]] = []
    if text is not None:
        if teacher.tokenize is None:
            raise UserError(f"{spec.name} reads no texts: search with --key KEY")
        queries.append((spec.text_vector, {"text": teacher.tokenize([text])}))
    if pictures:
        if teacher.view is None:
            raise UserError(f"{spec.name} reads no images: search with --key KEY")
        image_field = spec.image_vector if cache.fields[field].per_text else field
        queries += [(image_field, {"image": teacher.view(picture)[None]}) for picture in pictures]
    vectors = []
    for name, inputs in queries:
        with torch.inference_mode(), calling(f"teacher {spec.name}: encode", teacher.encode):
            outputs = teacher.encode(teacher.module, inputs)
        if name not in outputs or field not in (spec.image_vector, spec.text_vector, name):
            raise UserError(f"{spec.name} cannot search '{field}' by that: search with --key KEY")
        vectors.append(outputs[name][0].float().numpy())
    return vectors


def _results(
    cache: store.Cache, field: str, hits: list[tuple[int, float]], rows: dict[str, int]
) -> list[dict[str, Any]]:
    """Return key, score, image and texts of the results, without the rows of the query."""
    manifest = store.cached_manifest(cache)
    asked = set(rows.values())
    results = []
    for number, score in hits:
        row, text_number = divmod(number, per_row(cache, field))
        if row in asked:
            continue
        sample = manifest.row(row)
        where = str(manifest.root / sample.image) if sample.image else ""
        texts = [sample.texts[text_number]] if cache.fields[field].per_text else list(sample.texts)
        results.append({"key": sample.key, "score": round(score, 6), "image": where, "texts": texts})
    return results
