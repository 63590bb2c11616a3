"""Averages of the numbers of each row over slices: rows with one label, in one split or in one folder."""

from typing import Any

import numpy as np

from teachercache.analysis.report.one_cache import PerRow
from teachercache.analysis.report.opened import Subject


def slices(
    subject: Subject, columns: dict[str, np.ndarray], most: int = 60
) -> dict[str, list[dict[str, Any]]]:
    """Means of per-row numbers by label, split and folder, largest slices first."""
    table = subject.manifest.table.select(["key", "label", "split"])
    names = {kind: table[kind].to_numpy()[subject.rows] for kind in ("label", "split")}
    if len(np.unique(names["label"])) < 2:
        keys = table["key"].to_pylist()
        names["folder"] = np.array(
            [keys[row].rpartition("/")[0] for row in subject.rows.tolist()], dtype=object
        )
    said = {}
    for kind, values in names.items():
        found, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
        if 2 <= len(found) < max(3, len(values) / 2):
            order = np.argsort(-counts, kind="stable")[:most]
            said[kind] = [
                {
                    "name": found[i] or "(none)",
                    "num_rows": int(counts[i]),
                    **{name: _mean(column[inverse == i]) for name, column in columns.items()},
                }
                for i in order
            ]
    return said


def _mean(values: np.ndarray) -> float | None:
    kept = values[~np.isnan(values)]
    return float(kept.mean()) if len(kept) else None


def slice_columns(known: PerRow) -> dict[str, np.ndarray]:
    """What slices are compared by."""
    found = np.where(np.isnan(known.found), np.nan, known.found <= 1)
    columns = {
        "cosine to text": known.similarity,
        "surprise": known.surprise,
        "text->image R@1": found,
        "distance to neighbours": known.lonely,
    }
    return {name: values for name, values in columns.items() if not np.isnan(values).all()}
