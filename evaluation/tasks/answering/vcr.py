"""Visual Commonsense Reasoning (Zellers et al. 2019): Q2A, QA2R, and Q2AR, which needs both right on the same row.

The question of QA2R includes the right answer. A tie for the best choice is a miss. Files written by
`studies/vcr_mitigation.py` are measured like VCR's own.
"""

import json
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from evaluation.data.splits import rows_to_measure
from evaluation.models.answerer import Answerer, by_group, pick, scored_rows
from evaluation.tasks.task import Metrics
from teachercache.data.manifest import Manifest

LABEL_OF = {"q2a": "label", "qa2r": "rationale_label"}  # question -> the task column of its label
Tasks = Sequence[dict[str, Any]]  # the task column of each row


def evaluate(answerer: Answerer, manifest: Manifest) -> Metrics:
    """Compute the accuracies, also by category; a metric that cannot be computed gives the reason."""
    rows = rows_to_measure(manifest)
    tasks = [json.loads(manifest.table["task"][row].as_py() or "{}") for row in rows.tolist()]
    metrics: Metrics = {}
    hits: dict[str, np.ndarray] = {}  # for each row 1, 0, or NaN if it was not measured
    for which in LABEL_OF:
        hits[which], scores = _measure(answerer, manifest, rows, tasks, which)
        metrics |= scores
    hits["q2ar"] = np.minimum(hits["q2a"], hits["qa2r"])  # NaN if either is
    both = hits["q2ar"][~np.isnan(hits["q2ar"])]
    reasons = [metrics[which] for which in LABEL_OF if isinstance(metrics[which], str)]
    reason = reasons[0] if reasons else "skipped: no row has both labels"
    metrics["q2ar"] = float(both.mean()) if len(both) else reason
    categories = [task.get("category") for task in tasks]
    for which, values in hits.items():
        measured = np.flatnonzero(~np.isnan(values))
        metrics |= by_group(values[measured], [categories[i] for i in measured], f"{which}:category")
    return metrics | {"num_rows": len(rows)}


def _measure(
    answerer: Answerer, manifest: Manifest, rows: Int[np.ndarray, " n"], tasks: Tasks, which: str
) -> tuple[Float[np.ndarray, " n"], Metrics]:
    """Hits of each row (NaN if it was not measured), and the metrics of one of the two questions."""
    hits = np.full(len(rows), np.nan)
    column = LABEL_OF[which]
    labeled = np.array([task.get(column) is not None for task in tasks], bool)
    if not labeled.any():
        return hits, {which: f"skipped: {manifest.data} has no {column}"}
    scores = answerer.score(manifest, rows[labeled], which)
    if scores is None:
        return hits, {which: f"skipped: {answerer.name} was not made for {which}"}
    scored = scored_rows(scores)
    if not scored.any():
        return hits, {which: f"skipped: {answerer.name} has no score for any row"}
    chosen, ties = pick(scores)
    gold = np.array([tasks[i][column] for i in np.flatnonzero(labeled).tolist()])
    hits[labeled] = np.where(scored, chosen == gold, np.nan)
    return hits, {
        which: float((chosen == gold)[scored].mean()),
        f"{which}_tie_rate": float(ties[scored].mean()),
        f"{which}_num_skipped": int(len(rows) - scored.sum()),
    }
