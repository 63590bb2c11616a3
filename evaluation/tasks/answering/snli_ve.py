"""Visual entailment on SNLI-VE (Xie et al. 2019): accuracy over entailment, neutral and contradiction.

A model that clusters the measured rows themselves (zero-shot by 3-means, CLIP-TD section 4.2) uses no labels but is
transductive. Its result says so, and includes the best accuracy over all namings of its clusters.
"""

import itertools
import json

import numpy as np
from jaxtyping import Int

from evaluation.data.splits import rows_to_measure
from evaluation.models.answerer import Answerer, by_group, pick, scored_rows
from evaluation.tasks.task import Metrics
from teachercache.data.manifest import Manifest
from teachercache.data.readers.questions import LABELS


def evaluate(answerer: Answerer, manifest: Manifest) -> Metrics:
    """Compute the accuracy, also by class, and the rate of ties; rows without a gold label are left out."""
    rows = rows_to_measure(manifest)
    tasks = [json.loads(manifest.table["task"][row].as_py() or "{}") for row in rows.tolist()]
    gold = np.array([-1 if task.get("label") is None else task["label"] for task in tasks])
    rows, gold = rows[gold >= 0], gold[gold >= 0]
    if not len(rows):
        return {"accuracy": f"skipped: {manifest.data} has no gold labels"}
    scores = answerer.score(manifest, rows, "")
    if scores is None or not (scored := scored_rows(scores)).any():
        return {"accuracy": f"skipped: {answerer.name} has no score for any row"}
    chosen, ties = pick(scores)
    chosen, ties, gold = chosen[scored], ties[scored], gold[scored]
    metrics: Metrics = {"accuracy": float((chosen == gold).mean()), "tie_rate": float(ties.mean())}
    if answerer.clusters:
        metrics["accuracy_best_mapping"] = best_mapping(chosen, gold)
        metrics["protocol"] = "3-means of the rows measured: no labels, but transductive"
    metrics |= by_group(chosen == gold, [LABELS[label] for label in gold], "accuracy:label")
    return metrics | {"num_rows": len(gold), "num_skipped": len(tasks) - len(gold)}


def best_mapping(chosen: Int[np.ndarray, " n"], gold: Int[np.ndarray, " n"]) -> float:
    """Return the accuracy under the best one-to-one naming of the clusters (Hungarian matching)."""
    return max(
        float((np.array([*names, -1])[chosen] == gold).mean())
        for names in itertools.permutations(range(len(LABELS)))
    )
