"""Answer the queries of the page: the nearest rows of each cache, with the rank of each in the other cache."""

import base64
import binascii
import dataclasses
import json
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float

from teachercache.core.command import explained
from teachercache.core.errors import UserError
from teachercache.data.pictures import decode_image
from teachercache.data.sample import BadSample, Sample
from teachercache.search.filtered import Hits, Searcher, search_rows
from teachercache.search.query import sum_of_units
from teachercache.serve.facets import selected_rows, task_values
from teachercache.serve.opened import Served, check_number, fields_of

if TYPE_CHECKING:
    from PIL.Image import Image

MOST_RESULTS = 480
DEPTH = 1_000  # ranks in the other cache are known up to this one
LONGEST_TEXT = 2_000


@dataclasses.dataclass(frozen=True)
class Query:
    """What the page asks for.

    Attributes:
        text: A text, or an empty string.
        picture: A decoded picture.
        key: The key of a row, or an empty string.
        row: A cache and one of its rows.
        find: "pictures" or "texts"; "" for the default field of each cache.
        where: The chosen value of each filter.
        top: The number of results.
    """

    text: str
    picture: "Image | None"
    key: str
    row: tuple[int, int] | None
    find: str
    where: Mapping[str, str]
    top: int

    @property
    def is_empty(self) -> bool:
        """Whether rows are only listed."""
        return not self.text and self.picture is None and self.row is None


def parse(content: bytes) -> Query:
    """Return the query of a request's JSON; raise UserError if a value is not of its kind."""
    try:
        values = json.loads(content)
        text, key, find = (values.get(name, "") for name in ("text", "key", "find"))
        where, row, picture = values.get("where", {}), values.get("row"), values.get("picture", "")
        top = values.get("top", 48)
        strings = [text, key, find, picture, *where.keys(), *where.values()]
        numbers = [top, *(row or [])]
        right = all(isinstance(word, str) for word in strings) and all(type(n) is int for n in numbers)
        if not right or (row is not None and len(row) != 2) or not 1 <= top <= MOST_RESULTS:
            raise ValueError
        content = base64.b64decode(picture, validate=True)
    except (ValueError, TypeError, AttributeError, RecursionError, binascii.Error) as error:
        raise UserError("the request is not one of this page: load the page again") from error
    if len(text) > LONGEST_TEXT:
        raise UserError(f"the text has more than {LONGEST_TEXT:,} letters: search by a shorter one")
    try:
        image = decode_image(content) if content else None
    except BadSample as error:
        raise UserError(f"the picture cannot be read: {error}") from error
    return Query(text.strip(), image, key, tuple(row) if row else None, find, where, top)


def answer(caches: list[Served], query: Query) -> list[dict[str, Any]]:
    """Return the answer of each cache; one that cannot answer has an "error" line instead of results."""
    if query.key:
        query = dataclasses.replace(query, row=_find_key(caches, query.key))
    found = []
    for number in range(len(caches)):
        try:
            found.append(_find(caches, number, query))
        except Exception as error:  # of one cache: the other one still answers
            found.append({"cache": number, "error": explained(error)[1]})
    if len(caches) == 2 and not query.is_empty and all("hits" in part for part in found):
        for part, served, other, theirs in zip(found, caches, caches[::-1], found[::-1], strict=True):
            _add_ranks(part["results"], theirs["hits"], served=served, other=other)
    return [{name: value for name, value in part.items() if name != "hits"} for part in found]


def row_details(caches: list[Served], number: int, row: int) -> dict[str, Any]:
    """Return everything that the manifest holds about a row."""
    served, row = check_number(caches, number, row)
    sample = served.manifest.row(row)
    return {
        **_card(row, sample, list(sample.texts)),
        "image": sample.image,
        "problem": sample.problem,
        "task": task_values(sample.task),
    }


def _find_key(caches: list[Served], key: str) -> tuple[int, int]:
    """Return a cache that has a key, and its row; raise UserError with keys that exist if there is none."""
    for number, served in enumerate(caches):
        row = served.row_of(key)
        if row >= 0:
            return number, row
    some = caches[0].manifest.table["key"].slice(0, 2).to_pylist()
    raise UserError(f"no row has the key '{key}': keys are such as {' and '.join(map(repr, some))}")


# ----------------------------------------------------------------------------------------------------
# One cache


def _find(caches: list[Served], number: int, query: Query) -> dict[str, Any]:
    served = caches[number]
    start = time.perf_counter()
    rows = selected_rows(served.manifest, served.facets, query.where)
    total = len(served.manifest) if rows is None else int(rows.sum())
    if query.is_empty:
        chosen = np.arange(total) if rows is None else np.flatnonzero(rows)
        spread = (
            chosen[np.linspace(0, total - 1, min(query.top, total)).astype(np.int64)] if total else chosen
        )
        cards = [_card(row, served.manifest.row(row)) for row in spread.tolist()]
        return {"cache": number, "total": total, "results": cards, "exact": True, "note": ""}
    searcher = served.searchers.get(_field(served, query))
    same_row = _same_row(caches, number, query)
    vector = _vector(served, searcher, query, same_row)
    encoded = time.perf_counter()
    ours = 0 if same_row is None else searcher.vectors.per_row
    top = max(query.top, DEPTH) if len(caches) == 2 else query.top
    hits = _without(search_rows(searcher, vector, top=top + ours, rows=rows), searcher, same_row)
    searched = time.perf_counter()
    results = _results(served, searcher, hits, query.top)
    return {
        "cache": number,
        "total": total,
        "results": results,
        "exact": hits.exact,
        "note": "" if hits.exact else _approximate(searcher),
        "seconds": {
            "encode": round(encoded - start, 6),
            "search": round(searched - encoded, 6),
            "rows": round(time.perf_counter() - searched, 6),
        },
        "hits": _keys(served, searcher, hits),
    }


def _approximate(searcher: Searcher) -> str:
    settings = ", ".join(f"{name} {value}" for name, value in searcher.effort.items())
    return f"approximate: {searcher.kind} index, {settings}, recall@10 {searcher.recall:.2f}"


def _field(served: Served, query: Query) -> str:
    """Return the field that a query searches in a cache."""
    fields = fields_of(served.cache)
    if query.find and query.find not in fields:
        raise UserError(f"{served.cache.meta.spec.name} has no vectors of {query.find}")
    return fields[query.find] if query.find else next(iter(fields.values()))


def _same_row(caches: list[Served], number: int, query: Query) -> int | None:
    """Return the row of this cache with the key of the query's row; None if the query has no row."""
    if query.row is None:
        return None
    source, row = check_number(caches, *query.row)
    if source is caches[number]:
        return row
    key = source.manifest.table["key"][row].as_py()
    here = caches[number].row_of(key)
    if here < 0:
        raise UserError(f"this cache has no row '{key}': search by a text or a picture")
    return here


def _vector(served: Served, searcher: Searcher, query: Query, row: int | None) -> Float[np.ndarray, " dim"]:
    """Return the sum of the unit vectors of the parts of a query."""
    vectors = [] if row is None else [served.row_vector(searcher.field, row)]
    if query.text or query.picture is not None:
        pictures = [] if query.picture is None else [query.picture]
        vectors += served.live.encode(searcher.field, text=query.text or None, pictures=pictures)
    return sum_of_units(served.cache, searcher.field, vectors)


def _without(hits: Hits, searcher: Searcher, row: int | None) -> Hits:
    """Leave out the row of the query itself."""
    kept = np.ones(len(hits.ids), bool) if row is None else hits.ids // searcher.vectors.per_row != row
    return Hits(hits.ids[kept], hits.scores[kept], hits.exact)


def _results(served: Served, searcher: Searcher, hits: Hits, top: int) -> list[dict[str, Any]]:
    """Return a card for each of the best hits."""
    cards = []
    for rank, (number, score) in enumerate(
        zip(hits.ids[:top].tolist(), hits.scores[:top].tolist(), strict=True)
    ):
        row, text = divmod(number, searcher.vectors.per_row)
        sample = served.manifest.row(row)
        texts = [sample.texts[text]] if searcher.vectors.texts else list(sample.texts)
        cards.append({**_card(row, sample, texts), "rank": rank + 1, "score": round(score, 6), "text": text})
    return cards


def _card(row: int, sample: Sample, texts: list[str] | None = None) -> dict[str, Any]:
    return {
        "row": row,
        "key": sample.key,
        "texts": list(sample.texts) if texts is None else texts,
        "label": sample.label,
        "split": sample.split,
        "picture": bool(sample.image),
    }


# ----------------------------------------------------------------------------------------------------
# Two caches


def _keys(served: Served, searcher: Searcher, hits: Hits) -> dict[tuple[str, int], int]:
    """Return the rank of each hit by the key of its row and the number of its text."""
    rows, texts = np.divmod(hits.ids, searcher.vectors.per_row)
    keys = served.manifest.table["key"].take(rows).to_pylist()
    return {pair: rank for rank, pair in enumerate(zip(keys, texts.tolist(), strict=True), 1)}


def _add_ranks(
    results: list[dict[str, Any]], theirs: Mapping[tuple[str, int], int], *, served: Served, other: Served
) -> None:
    """Add the rank in the other cache: a number, 0 beyond the last known one, or None for a row it does not have."""
    import pyarrow as pa
    import pyarrow.compute as pc

    keys = other.manifest.table["key"]
    same_rows = served.cache.meta.manifest == other.cache.meta.manifest
    lost = [result["key"] for result in results if (result["key"], result["text"]) not in theirs]
    there: set[str] = set(lost)
    if lost and not same_rows:
        there = set(keys.filter(pc.is_in(keys, value_set=pa.array(lost, pa.string()))).to_pylist())
    for result in results:
        rank = theirs.get((result["key"], result["text"]))
        result["other"] = rank if rank or result["key"] not in there else 0
    for result in results:
        result["beyond"] = len(theirs)
