"""Visual entailment on SNLI-VE (Xie et al. 2019): accuracy over entailment, neutral and contradiction. Not for SNLI.

A model that clusters the very rows asked (zero-shot by 3-means, CLIP-TD section 4.2) uses no labels but is
transductive: the result says so, and holds the best accuracy that any naming of its clusters would have.
"""

import itertools
import json
from typing import Any

import numpy as np

from evaluation.models.answerer import Answerer, asked, by_group, pick, rows_to_measure
from teachercache.data.manifest import Manifest
from teachercache.data.readers.questions import LABELS


def evaluate(answerer: Answerer, manifest: Manifest) -> dict[str, Any]:
    """Accuracy, per class, and how often two labels share the best score; rows without a gold label are left out."""
    rows = rows_to_measure(manifest)
    tasks = [json.loads(manifest.table["task"][row].as_py() or "{}") for row in rows.tolist()]
    gold = np.array([-1 if task.get("label") is None else task["label"] for task in tasks])
    rows, gold = rows[gold >= 0], gold[gold >= 0]
    if not len(rows):
        return {"accuracy": f"skipped: {manifest.data} has no gold labels"}
    scores = answerer.score(manifest, rows, "")
    if scores is None or not (heard := asked(scores)).any():
        return {"accuracy": f"skipped: {answerer.name} has no score for any row"}
    chosen, ties = pick(scores)
    chosen, ties, gold = chosen[heard], ties[heard], gold[heard]
    metrics: dict[str, Any] = {"accuracy": float((chosen == gold).mean()), "tie_rate": float(ties.mean())}
    if answerer.clusters:
        metrics["accuracy_best_mapping"] = best_mapping(chosen, gold)
        metrics["protocol"] = "3-means of the rows measured: no labels, but transductive"
    metrics |= by_group(chosen == gold, [LABELS[label] for label in gold], "accuracy:label")
    return metrics | {"num_rows": len(gold), "num_skipped": len(tasks) - len(gold)}


def best_mapping(chosen: np.ndarray, gold: np.ndarray) -> float:
    """The accuracy under the best one-to-one naming of the clusters: what the labels would give (Hungarian)."""
    return max(
        float((np.array([*names, -1])[chosen] == gold).mean())
        for names in itertools.permutations(range(len(LABELS)))
    )
