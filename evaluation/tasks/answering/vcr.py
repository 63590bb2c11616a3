"""Visual Commonsense Reasoning: Q2A, QA2R and Q2AR, which takes both right on the same row (Zellers et al. 2019).

QA2R is asked with the right answer given. A tie for the best choice is no hit. Not for making easier or harder sets:
see `vcr_mitigation.py`; its files are measured like any other.
"""

import json
from typing import Any

import numpy as np

from evaluation.models.answerer import Answerer, asked, by_group, pick, rows_to_measure
from teachercache.data.manifest import Manifest

ASKED = {"q2a": "label", "qa2r": "rationale_label"}  # which -> its task column


def evaluate(answerer: Answerer, manifest: Manifest) -> dict[str, Any]:
    """Shares of right choices, per category where the data has some; what cannot be measured says why."""
    rows = rows_to_measure(manifest)
    tasks = [json.loads(manifest.table["task"][row].as_py() or "{}") for row in rows.tolist()]
    metrics: dict[str, Any] = {}
    right: dict[str, np.ndarray] = {}  # per row: 1, 0, or NaN where it was not asked
    for which, column in ASKED.items():
        right[which], found = _one(answerer, manifest, rows, tasks, which, column)
        metrics |= found
    both = np.minimum(right["q2a"], right["qa2r"])  # NaN where either is
    told = ~np.isnan(both)
    reasons = [metrics[which] for which in ASKED if isinstance(metrics[which], str)]
    nothing = reasons[0] if reasons else "skipped: no row has both labels"
    metrics["q2ar"] = float(both[told].mean()) if told.any() else nothing
    groups = [task.get("category") for task in tasks]
    for which, values in {**right, "q2ar": both}.items():
        known = ~np.isnan(values)
        metrics |= by_group(values[known], [groups[i] for i in np.flatnonzero(known)], f"{which}:category")
    return metrics | {"num_rows": len(rows)}


def _one(
    answerer: Answerer, manifest: Manifest, rows: np.ndarray, tasks: list[dict], which: str, column: str
) -> tuple[np.ndarray, dict[str, Any]]:
    """Right or wrong per row, and the metrics of one of the two questions."""
    right = np.full(len(rows), np.nan)
    labelled = np.array([task.get(column) is not None for task in tasks], bool)
    if not labelled.any():
        return right, {which: f"skipped: {manifest.data} has no {column}"}
    scores = answerer.score(manifest, rows[labelled], which)
    if scores is None:
        return right, {which: f"skipped: {answerer.name} was not made for {which}"}
    heard = asked(scores)
    if not heard.any():
        return right, {which: f"skipped: {answerer.name} has no score for any row"}
    chosen, ties = pick(scores)
    label = np.array([task[column] for task, known in zip(tasks, labelled, strict=True) if known])
    right[labelled] = np.where(heard, chosen == label, np.nan)
    return right, {
        which: float((chosen == label)[heard].mean()),
        f"{which}_tie_rate": float(ties[heard].mean()),
        f"{which}_num_skipped": int(len(rows) - heard.sum()),
    }
