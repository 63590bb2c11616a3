"""VQA v2 and OK-VQA with a fixed answer vocabulary, by the official soft accuracy (Antol et al. 2015).

    accuracy(a) = mean over the ten subsets of nine annotators of min(number who answered a / 3, 1)

Protocol `official`: if all ten annotators gave the same answer, neither theirs nor the model's is normalized. Protocol
`mmf`: answers are always normalized. For generated answers see `tasks/writing/open_vqa.py`.
"""

import json

import numpy as np
from jaxtyping import Bool, Int

from evaluation.data.splits import rows_to_measure
from evaluation.metrics.vqa_answers import soft_accuracy
from evaluation.models.answerer import Answerer, by_group, pick, scored_rows
from evaluation.tasks.task import Metrics
from teachercache.core.errors import UserError
from teachercache.data.manifest import Manifest

CHUNK = 4096  # rows scored at a time: their scores of 3,129 answers are 51 MB
PROTOCOLS = ("official", "mmf")


def evaluate(answerer: Answerer, manifest: Manifest, protocol: str = "official") -> Metrics:
    """Compute the soft accuracy, also by answer type and question type; a tie for the best answer is wrong.

    Raises:
        UserError: If the protocol is unknown.
    """
    if protocol not in PROTOCOLS:
        raise UserError(f"unknown protocol '{protocol}' of VQA: choose from {', '.join(PROTOCOLS)}")
    rows = rows_to_measure(manifest)
    tasks = [json.loads(manifest.table["task"][row].as_py() or "{}") for row in rows.tolist()]
    labeled = np.array([bool(task.get("answers")) for task in tasks], bool)
    if not labeled.any():
        return {"accuracy": f"skipped: {manifest.data} has no answers"}
    rows, tasks = rows[labeled], [tasks[i] for i in np.flatnonzero(labeled)]
    columns, ties, scored = _choices(answerer, manifest, rows)
    if not scored.any():
        return {"accuracy": f"skipped: {answerer.name} has no score for any row"}
    tasks = [tasks[i] for i in np.flatnonzero(scored)]
    chosen = [None if column < 0 else answerer.answers[column] for column in columns[scored].tolist()]
    hits = np.array(
        [soft_accuracy(answer, task["answers"], protocol) for answer, task in zip(chosen, tasks, strict=True)]
    )
    return {
        "accuracy": float(hits.mean()),
        "tie_rate": float(ties[scored].mean()),
        **by_group(hits, [task.get("answer_type") for task in tasks], "accuracy:answer_type"),
        **by_group(hits, [task.get("question_type") for task in tasks], "accuracy:question_type"),
        "protocol": protocol,
        "num_rows": len(hits),
        "num_answers": len(answerer.answers),
        "num_skipped": len(labeled) - len(hits),
    }


def _choices(
    answerer: Answerer, manifest: Manifest, rows: Int[np.ndarray, " n"]
) -> tuple[Int[np.ndarray, " n"], Bool[np.ndarray, " n"], Bool[np.ndarray, " n"]]:
    """Chosen column of each row (-1: none), whether the best score is a tie, and whether the row could be scored."""
    chunks = []
    for start in range(0, len(rows), CHUNK):
        chunk = rows[start : start + CHUNK]
        scores = answerer.score(manifest, chunk, "")
        if scores is None:
            none = np.zeros(len(chunk), bool)
            chunks.append((np.full(len(chunk), -1), none, none))
        else:
            chunks.append((*pick(scores), scored_rows(scores)))
    columns, ties, scored = (np.concatenate(column) for column in zip(*chunks, strict=True))
    return columns, ties, scored
