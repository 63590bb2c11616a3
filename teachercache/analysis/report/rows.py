"""Collect the rows that the page shows: texts, colors, coordinates and neighbors."""

import dataclasses
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from teachercache.analysis import neighbors
from teachercache.analysis.report.opened import Subject, draw, rows_of
from teachercache.search.vectors import Vectors

NEAREST = 6
ROW_NAMES = ("row", "rows", "neighbours", "neighbours_against")
COLORS = 11  # values with their own color; the rest share one
TEXTS, LETTERS = 3, 300  # the most that the page holds of a row
ALL_LETTERS = 2_500_000  # of all rows together


@dataclasses.dataclass(frozen=True)
class Shown:
    """The shown rows, ascending, with their data."""

    rows: Int[np.ndarray, " n"]
    keys: list[str]
    texts: list[list[str]]
    columns: dict[str, list[str] | np.ndarray]  # values to color rows by: names or numbers
    maps: list[dict[str, Any]]  # title and parts, each with `what` and `xy` [n, 2]
    lists: list[dict[str, Any]]  # title, `at` [n, k] positions or -1, `cosine` [n, k]


def mentioned(report: Any) -> set[int]:
    """Return every row that a report mentions."""
    rows: set[int] = set()
    if isinstance(report, dict):
        for name, value in report.items():
            if name in ROW_NAMES and isinstance(value, int | list):
                rows |= set(value if isinstance(value, list) else [value])
            else:
                rows |= mentioned(value)
    elif isinstance(report, list) and report and isinstance(report[0], dict):
        for item in report:
            rows |= mentioned(item)
    return rows


def name_rows(report: Any, keys: dict[int, str]) -> Any:
    """Return the report with `key` or `keys` beside the rows that it mentions."""
    if isinstance(report, list):
        return (
            [name_rows(item, keys) for item in report] if report and isinstance(report[0], dict) else report
        )
    if not isinstance(report, dict):
        return report
    named = {name: name_rows(value, keys) for name, value in report.items()}
    for name in set(ROW_NAMES) & set(report):
        value = report[name]
        named[name.replace("row", "key") if "row" in name else f"{name}_keys"] = (
            [keys[row] for row in value] if isinstance(value, list) else keys[value]
        )
    return named


def rows_to_show(subject: Subject, report: dict[str, Any], most: int) -> Int[np.ndarray, " n"]:
    """Return `most` random rows and all that the report mentions."""
    drawn = subject.rows[draw(len(subject.main), most)]
    return np.union1d(drawn, np.array(sorted(mentioned(report)), np.int64))


def texts_of(subject: Subject, rows: np.ndarray) -> list[list[str]]:
    """Return some texts of each row, shortened if they are long."""
    column = subject.manifest.table["texts"].take(rows).to_pylist()
    most = min(LETTERS, max(60, ALL_LETTERS // max(1, sum(min(TEXTS, len(texts)) for texts in column))))
    return [
        [text if len(text) <= most else f"{text[: most - 3]}..." for text in texts[:TEXTS]]
        for texts in column
    ]


def names_of(subject: Subject, rows: np.ndarray, column: str) -> list[str]:
    """Return a column of the manifest at some rows."""
    return subject.manifest.table[column].take(rows).to_pylist()


def at_rows(subject: Subject, values: np.ndarray, rows: np.ndarray) -> Float[np.ndarray, " n"]:
    """Return values of the rows of `subject.main` at some rows; nan for rows without a vector."""
    own_rows = subject.rows
    places = np.minimum(np.searchsorted(own_rows, rows), len(own_rows) - 1)
    return np.where(own_rows[places] == rows, values[places], np.nan)


def neighbor_lists(
    subject: Subject, rows: np.ndarray, second: Vectors | None = None, second_rows: np.ndarray | None = None
) -> list[dict[str, Any]]:
    """Return the nearest shown neighbors of each shown row: within and across modalities, and in a second
    cache.
    """
    what = "pictures" if subject.pictures is not None else "texts"
    lists = [_list(f"{what} like it", subject.main, subject.main, rows, rows)]
    if subject.both:
        assert subject.firsts is not None
        lists.append(_list("texts for the picture", subject.main, subject.firsts, rows, rows))
        lists.append(_list("pictures for its text", subject.firsts, subject.main, rows, rows))
    if second is not None and second_rows is not None:
        lists.append(_list(f"{what} like it in the second cache", second, second, second_rows, second_rows))
    return lists


def _list(title: str, asking: Vectors, asked: Vectors, own: np.ndarray, rows: np.ndarray) -> dict[str, Any]:
    """Return the nearest candidates of the queries at some rows (-1: none), as positions in `rows`."""
    positions, cosine = (
        np.full((len(rows), NEAREST), -1, np.int32),
        np.zeros((len(rows), NEAREST), np.float32),
    )
    (queries, own_ids), (candidates, ids) = _at(asking, own), _at(asked, rows)
    if len(queries) and len(candidates) > 1:
        narrowed = dataclasses.replace(asked, ids=ids)
        k = min(NEAREST + 1, len(ids))
        scores, nearest_ids = neighbors.exact_search(narrowed, asking.take(own_ids), k)
        place = candidates[neighbors.positions(ids, nearest_ids)]  # in `rows`
        same = place == queries[:, None] if asking is asked else np.zeros(place.shape, bool)
        order = np.argsort(same, axis=1, kind="stable")[:, : min(NEAREST, k - (asking is asked))]
        positions[queries, : order.shape[1]] = np.take_along_axis(place, order, 1)
        cosine[queries, : order.shape[1]] = np.take_along_axis(scores, order, 1)
    return {"title": title, "at": positions, "cosine": cosine}


def _at(vectors: Vectors, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return positions in `rows` that have a vector, and their ids. There is one vector per row; rows
    ascend.
    """
    mine = rows_of(vectors)
    at = np.minimum(np.searchsorted(mine, rows), len(mine) - 1)
    present = np.flatnonzero(mine[at] == rows)
    return present, vectors.ids[at[present]]


def as_category(names: list[str]) -> tuple[list[str], Int[np.ndarray, " n"], bool]:
    """Return the most common names (the last one for all others), the name of each row, and whether there
    are others.
    """
    distinct, inverse, counts = np.unique(
        np.array(names, dtype=object), return_inverse=True, return_counts=True
    )
    order = np.argsort(-counts, kind="stable")
    place = np.empty(len(order), np.int32)
    place[order] = np.arange(len(order))
    values = [distinct[i] or "(none)" for i in order]
    rest = len(values) > COLORS + 1
    return ([*values[:COLORS], "others"] if rest else values), np.minimum(place, COLORS)[inverse], rest
