"""The values of a manifest that rows are filtered by: split, label, and tags in the task columns."""

import dataclasses
import json
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Bool, Int

from teachercache.core.errors import UserError, closest
from teachercache.core.progress import ticker
from teachercache.data.manifest import Manifest

if TYPE_CHECKING:
    import pyarrow as pa

MOST_VALUES = 2_000  # of a task column: one with more (questions, ids) is no filter
LISTED = 500  # values that the page lists; others can be typed
AT_ONCE = 8192


@dataclasses.dataclass(frozen=True)
class Facet:
    """One filter. A row may have several values, such as tags, or none.

    Attributes:
        name: The name of the column.
        values: The distinct values, the most frequent first.
        counts: The number of rows of each value.
        rows: The rows of each value, in order, those of the first value first.
        starts: Where the rows of each value begin in `rows`, and their end.
    """

    name: str
    values: "pa.Array"
    counts: Int[np.ndarray, " values"]
    rows: Int[np.ndarray, " entries"]
    starts: Int[np.ndarray, " bounds"]


def find_facets(manifest: Manifest) -> list[Facet]:
    """Return the filters of a manifest: columns with at least one value."""
    facets = [_column_facet(manifest, name) for name in ("split", "label")]
    return [facet for facet in [*facets, *_task_facets(manifest)] if len(facet.values)]


def selected_rows(
    manifest: Manifest, facets: list[Facet], chosen: Mapping[str, str]
) -> Bool[np.ndarray, " rows"] | None:
    """Return which rows have all chosen values; None if no value is chosen.

    Raises:
        UserError: There is no such column.
    """
    import pyarrow as pa
    import pyarrow.compute as pc

    by_name = {facet.name: facet for facet in facets}
    kept = None
    for name, value in chosen.items():
        if name not in by_name:
            hint = closest(name, by_name)
            raise UserError(
                f"no row has a column '{name}': {hint}choose from {', '.join(by_name) or 'no filter'}"
            )
        facet = by_name[name]
        code = pc.index(facet.values, pa.scalar(value, pa.string())).as_py()
        mask = np.zeros(len(manifest), bool)
        if code >= 0:
            mask[facet.rows[facet.starts[code] : facet.starts[code + 1]]] = True
        kept = mask if kept is None else kept & mask
    return kept


def _column_facet(manifest: Manifest, name: str) -> Facet:
    """Return the filter of a column of strings. Values stay in Arrow, whatever their number."""
    import pyarrow.compute as pc

    encoded = manifest.table[name].combine_chunks().dictionary_encode()
    codes = encoded.indices.to_numpy(zero_copy_only=False)
    blank = pc.equal(encoded.dictionary, "").to_numpy(zero_copy_only=False)
    rows = np.flatnonzero(~blank[codes]) if len(blank) else np.arange(0)
    return _sorted(name, encoded.dictionary, rows, codes[rows])


def _sorted(name: str, values: "pa.Array", rows: np.ndarray, codes: np.ndarray) -> Facet:
    """Return a filter whose values are sorted by the number of rows, without values of no row."""
    counts = np.bincount(codes, minlength=len(values))
    order = np.argsort(-counts, kind="stable")
    order = order[counts[order] > 0]
    place = np.zeros(len(values), np.int32)
    place[order] = np.arange(len(order))
    by_value = np.argsort(place[codes], kind="stable")
    starts = np.concatenate([[0], np.cumsum(counts[order])])
    return Facet(name, values.take(order), counts[order], rows[by_value].astype(np.int32), starts)


def _task_facets(manifest: Manifest) -> list[Facet]:
    """Return the filters of the task columns: strings, numbers, booleans and lists of them with few values."""
    import pyarrow as pa

    codes: dict[str, dict[str, int]] = {}
    entries: dict[str, list[tuple[int, int]]] = {}
    dropped: set[str] = set()
    for row, columns in _tasks(manifest):
        for name, value in columns.items():
            if name in dropped or name in ("split", "label"):
                continue
            known = codes.setdefault(name, {})
            for word in {_word(part) for part in (value if isinstance(value, list) else [value])} - {""}:
                entries.setdefault(name, []).append((row, known.setdefault(word, len(known))))
            if len(known) > MOST_VALUES:
                dropped.add(name)
                del codes[name], entries[name]
    return [
        _sorted(name, pa.array(codes[name], pa.string()), *np.array(pairs, np.int64).T)
        for name, pairs in entries.items()
        if 2 * len(codes[name]) <= len(pairs) + 2  # a column whose values are all different is no filter
    ]


def _word(value: Any) -> str:
    """Return a scalar as the text of a filter, or an empty string."""
    if isinstance(value, bool | int | float):
        return json.dumps(value)
    return value if isinstance(value, str) else ""


def _tasks(manifest: Manifest) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield each row with task columns, parsed in batches."""
    import pyarrow.compute as pc

    column = manifest.table["task"]
    if not pc.any(pc.not_equal(column, "")).as_py():
        return
    with ticker(len(manifest), "rows", "task columns") as tick:
        for start in range(0, len(manifest), AT_ONCE):
            part = column.slice(start, AT_ONCE).to_pylist()
            for row, text in enumerate(part, start):
                columns = task_values(text)
                if columns:
                    yield row, columns
            tick.step(len(part))


def task_values(text: str) -> dict[str, Any]:
    """Return the task columns of a row; none if its JSON is not an object."""
    try:
        columns = json.loads(text) if text else {}
    except (ValueError, RecursionError):
        return {}
    return columns if isinstance(columns, dict) else {}
