"""The rows that the page shows: their texts, colours, places and neighbours among themselves. Draws nothing."""

import dataclasses
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from teachercache.analysis import neighbours
from teachercache.analysis.report.opened import Subject, draw, rows_of
from teachercache.search.vectors import Vectors

NEAREST = 6
ROW_NAMES = ("row", "rows", "neighbours", "neighbours_against")
COLOURS = 11  # values with a colour of their own; the rest share one
TEXTS, LETTERS = 3, 300  # of a row that the page holds, at most
ALL_LETTERS = 2_500_000  # of all rows together


@dataclasses.dataclass(frozen=True)
class Shown:
    """Some rows, ascending, with all that the page knows of each."""

    rows: Int[np.ndarray, " n"]
    keys: list[str]
    texts: list[list[str]]
    columns: dict[str, list[str] | np.ndarray]  # what they can be coloured by: names or numbers
    maps: list[dict[str, Any]]  # title and parts, each with `what` and `xy` [n, 2]
    lists: list[dict[str, Any]]  # title, `at` [n, k] positions or -1, `cosine` [n, k]


def mentioned(report: Any) -> set[int]:
    """Every row that a report names."""
    found: set[int] = set()
    if isinstance(report, dict):
        for name, value in report.items():
            if name in ROW_NAMES and isinstance(value, int | list):
                found |= set(value if isinstance(value, list) else [value])
            else:
                found |= mentioned(value)
    elif isinstance(report, list) and report and isinstance(report[0], dict):
        for item in report:
            found |= mentioned(item)
    return found


def name_rows(report: Any, keys: dict[int, str]) -> Any:
    """The report with `key` or `keys` beside the rows that it names."""
    if isinstance(report, list):
        return (
            [name_rows(item, keys) for item in report] if report and isinstance(report[0], dict) else report
        )
    if not isinstance(report, dict):
        return report
    found = {name: name_rows(value, keys) for name, value in report.items()}
    for name in set(ROW_NAMES) & set(report):
        value = report[name]
        found[name.replace("row", "key") if "row" in name else f"{name}_keys"] = (
            [keys[row] for row in value] if isinstance(value, list) else keys[value]
        )
    return found


def rows_to_show(subject: Subject, report: dict[str, Any], most: int) -> Int[np.ndarray, " n"]:
    """Rows by chance, `most` of them, and all that the report names."""
    drawn = subject.rows[draw(len(subject.main), most)]
    return np.union1d(drawn, np.array(sorted(mentioned(report)), np.int64))


def texts_of(subject: Subject, rows: np.ndarray) -> list[list[str]]:
    """Some texts of each row, cut where they are long."""
    column = subject.manifest.table["texts"].take(rows).to_pylist()
    most = min(LETTERS, max(60, ALL_LETTERS // max(1, sum(min(TEXTS, len(texts)) for texts in column))))
    return [
        [text if len(text) <= most else f"{text[: most - 3]}..." for text in texts[:TEXTS]]
        for texts in column
    ]


def names_of(subject: Subject, rows: np.ndarray, column: str) -> list[str]:
    """A column of the manifest at some rows."""
    return subject.manifest.table[column].take(rows).to_pylist()


def at_rows(subject: Subject, values: np.ndarray, rows: np.ndarray) -> Float[np.ndarray, " n"]:
    """What is known of `subject.main`'s rows, at some rows; nan where a row has no vector."""
    mine = subject.rows
    at = np.minimum(np.searchsorted(mine, rows), len(mine) - 1)
    return np.where(mine[at] == rows, values[at], np.nan)


def neighbour_lists(
    subject: Subject, rows: np.ndarray, second: Vectors | None = None, second_rows: np.ndarray | None = None
) -> list[dict[str, Any]]:
    """Each shown row's nearest others among those shown, of its kind, across kinds, and in a second cache."""
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
    """The nearest of `asked` to each of `asking` at some rows (-1: nowhere), as positions in `rows`."""
    at, cosine = np.full((len(rows), NEAREST), -1, np.int32), np.zeros((len(rows), NEAREST), np.float32)
    (queries, own_ids), (candidates, ids) = _at(asking, own), _at(asked, rows)
    if len(queries) and len(candidates) > 1:
        narrowed = dataclasses.replace(asked, ids=ids)
        k = min(NEAREST + 1, len(ids))
        scores, found = neighbours.exact_search(narrowed, asking.take(own_ids), k)
        place = candidates[neighbours.positions(ids, found)]  # in `rows`
        same = place == queries[:, None] if asking is asked else np.zeros(place.shape, bool)
        order = np.argsort(same, axis=1, kind="stable")[:, : min(NEAREST, k - (asking is asked))]
        at[queries, : order.shape[1]] = np.take_along_axis(place, order, 1)
        cosine[queries, : order.shape[1]] = np.take_along_axis(scores, order, 1)
    return {"title": title, "at": at, "cosine": cosine}


def _at(vectors: Vectors, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Positions in `rows` that have a vector, and their ids; one vector a row, rows ascending."""
    mine = rows_of(vectors)
    at = np.minimum(np.searchsorted(mine, rows), len(mine) - 1)
    there = np.flatnonzero(mine[at] == rows)
    return there, vectors.ids[at[there]]


def as_category(names: list[str]) -> tuple[list[str], Int[np.ndarray, " n"], bool]:
    """The commonest names, the last for all others; which of them each row has; whether there are others."""
    found, inverse, counts = np.unique(np.array(names, dtype=object), return_inverse=True, return_counts=True)
    order = np.argsort(-counts, kind="stable")
    place = np.empty(len(order), np.int32)
    place[order] = np.arange(len(order))
    values = [found[i] or "(none)" for i in order]
    rest = len(values) > COLOURS + 1
    return ([*values[:COLOURS], "others"] if rest else values), np.minimum(place, COLOURS)[inverse], rest
