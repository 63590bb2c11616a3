"""VQA v2 and OK-VQA by the official soft accuracy (Antol et al. 2015), its quirks included. Not for free-form text.

    accuracy(a) = mean over the ten sets of nine annotators of min(number who said a / 3, 1)

`official`: where all ten said the same, neither theirs nor the model's answer is normalised. `mmf`: always.
"""

import json
from typing import Any

import numpy as np

from evaluation.metrics.vqa_answers import soft_accuracy
from evaluation.models.answerer import Answerer, asked, by_group, pick, rows_to_measure
from teachercache.core.errors import UserError
from teachercache.data.manifest import Manifest

CHUNK = 4096  # rows scored at once: their scores of 3,129 answers are 51 MB


def evaluate(answerer: Answerer, manifest: Manifest, protocol: str = "official") -> dict[str, Any]:
    """The soft accuracy over a split, per answer type and question type; a tie for the best answer is no answer."""
    if protocol not in ("official", "mmf"):
        raise UserError(f"unknown protocol '{protocol}' of VQA: choose from official, mmf")
    rows = rows_to_measure(manifest)
    tasks = [json.loads(manifest.table["task"][row].as_py() or "{}") for row in rows.tolist()]
    known = np.array([bool(task.get("answers")) for task in tasks], bool)
    if not known.any():
        return {"accuracy": f"skipped: {manifest.data} has no answers"}
    tasks, rows = [task for task, there in zip(tasks, known, strict=True) if there], rows[known]
    chosen, ties, heard = _chosen(answerer, manifest, rows)
    if not heard.any():
        return {"accuracy": f"skipped: {answerer.name} has no score for any row"}
    tasks = [tasks[i] for i in np.flatnonzero(heard)]
    said = [None if place < 0 else answerer.answers[place] for place in chosen[heard].tolist()]
    hits = np.array(
        [soft_accuracy(word, task["answers"], protocol) for word, task in zip(said, tasks, strict=True)]
    )
    return {
        "accuracy": float(hits.mean()),
        "tie_rate": float(ties[heard].mean()),
        **by_group(hits, [task.get("answer_type") for task in tasks], "accuracy:answer_type"),
        **by_group(hits, [task.get("question_type") for task in tasks], "accuracy:question_type"),
        "protocol": protocol,
        "num_rows": len(hits),
        "num_answers": len(answerer.answers),
        "num_skipped": len(known) - len(hits),
    }


def _chosen(
    answerer: Answerer, manifest: Manifest, rows: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Which answer each row got (-1: none), where two shared the best score, which rows could be asked."""
    parts = []
    for start in range(0, len(rows), CHUNK):
        part = rows[start : start + CHUNK]
        scores = answerer.score(manifest, part, "")
        if scores is None:
            parts.append((np.full(len(part), -1), np.zeros(len(part), bool), np.zeros(len(part), bool)))
        else:
            parts.append((*pick(scores), asked(scores)))
    chosen, ties, heard = (np.concatenate(column) for column in zip(*parts, strict=True))
    return chosen, ties, heard
