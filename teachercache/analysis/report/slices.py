"""Averages of the numbers of each row over slices: rows with one label, in one split or in one folder."""

from typing import Any

import numpy as np

from teachercache.analysis.report.one_cache import PerRow
from teachercache.analysis.report.opened import Subject


def slices(
    subject: Subject, columns: dict[str, np.ndarray], most: int = 60
) -> dict[str, list[dict[str, Any]]]:
    """Return means of per-row numbers by label, split and folder, largest slices first."""
    table = subject.manifest.table.select(["key", "label", "split"])
    names = {kind: table[kind].to_numpy()[subject.rows] for kind in ("label", "split")}
    if len(np.unique(names["label"])) < 2:
        keys = table["key"].to_pylist()
        names["folder"] = np.array(
            [keys[row].rpartition("/")[0] for row in subject.rows.tolist()], dtype=object
        )
    result = {}
    for kind, values in names.items():
        names_found, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
        if 2 <= len(names_found) < max(3, len(values) / 2):
            order = np.argsort(-counts, kind="stable")[:most]
            result[kind] = [
                {
                    "name": names_found[i] or "(none)",
                    "num_rows": int(counts[i]),
                    **{name: _mean(column[inverse == i]) for name, column in columns.items()},
                }
                for i in order
            ]
    return result


def _mean(values: np.ndarray) -> float | None:
    kept = values[~np.isnan(values)]
    return float(kept.mean()) if len(kept) else None


def slice_columns(per_row: PerRow) -> dict[str, np.ndarray]:
    """Return the numbers that slices are compared by."""
    hits = np.where(np.isnan(per_row.rank), np.nan, per_row.rank <= 1)
    columns = {
        "cosine to text": per_row.similarity,
        "surprise": per_row.surprise,
        "text->image R@1": hits,
        "distance to neighbors": per_row.lonely,
    }
    return {name: values for name, values in columns.items() if not np.isnan(values).all()}
