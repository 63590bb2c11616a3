"""VQA v2 and OK-VQA with generated answers (VLKD, section 4.3.2), by the official soft accuracy.

For models that choose from a fixed vocabulary of answers see `tasks/answering/vqa.py`.
"""

import json
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from evaluation.data.splits import rows_to_measure
from evaluation.metrics.vqa_answers import soft_accuracy
from evaluation.models.answerer import by_group
from evaluation.models.generator import ANSWERING, Generator, answer_prompt, generate_for_rows
from evaluation.tasks.task import Metrics
from teachercache.core.errors import UserError
from teachercache.data.manifest import Manifest

Answered = tuple[str, dict[str, Any]]  # a generated answer, and the facts about its question


def evaluate(
    generator: Generator,
    manifest: Manifest,
    masks: int = ANSWERING.masks,
    beams: int = ANSWERING.beams,
    *,
    protocol: str = "official",
) -> Metrics:
    """Answer the questions of the val split and compute the soft accuracy, also by answer type and question type.

    Args:
        generator: The model.
        manifest: VQA's questions with images and annotations.
        masks: Number of [MASK]s in the prompt.
        beams: Beam size.
        protocol: "official" or "mmf"; see `tasks/answering/vqa.py`.

    Returns:
        The metrics, and `results` in VQA's format. OK-VQA's answers are stems: `accuracy:raw_answer` compares with the
        words that annotators wrote. An empty answer is wrong. `accuracy:always` is the accuracy of always giving the
        most frequent answer.

    Raises:
        UserError: If the data have no questions or no readable image.
    """
    rows = rows_to_measure(manifest).tolist()
    facts = {row: json.loads(manifest.table["task"][row].as_py() or "{}") for row in rows}
    rows = [row for row in rows if "question" in facts[row]]
    if not rows:
        raise UserError(f"{manifest.data} has no questions: pass VQA's questions .json")
    prompts = [answer_prompt(facts[row]["question"], masks) for row in rows]
    generated = generate_for_rows(generator, manifest, rows, prompts, beams=beams)
    pairs = list(zip(generated.texts, generated.rows, strict=True))
    labeled = [(text, facts[row]) for text, row in pairs if facts[row].get("answers")]
    metrics: Metrics = {**_scores(labeled, protocol, manifest.data)}
    return metrics | {
        "protocol": protocol,
        "masks": masks,
        "beams": beams,
        "num_rows": len(labeled),
        "num_different": len(set(generated.texts)),
        "num_skipped": len(generated.skipped),
        "results": [{"question_id": facts[row].get("id"), "answer": text} for text, row in pairs],
    }


def _scores(labeled: Sequence[Answered], protocol: str, data: str) -> dict[str, float | str]:
    """Accuracies of the answers to questions with annotations."""
    if not labeled:
        return {"accuracy": f"skipped: {data} has no answers"}

    def accuracies(key: str, answered: Sequence[Answered]) -> Float[np.ndarray, " n"]:
        return np.array([soft_accuracy(text or None, fact[key], protocol) for text, fact in answered])

    hits, questions = accuracies("answers", labeled), [fact for _, fact in labeled]
    most_frequent = Counter(answer for fact in questions for answer in fact["answers"]).most_common(1)[0][0]
    scores: dict[str, float | str] = {
        "accuracy": float(hits.mean()),
        "accuracy:always": float(accuracies("answers", [(most_frequent, fact) for fact in questions]).mean()),
    }
    if raw := [(text, fact) for text, fact in labeled if fact.get("raw_answers")]:
        scores["accuracy:raw_answer"] = float(accuracies("raw_answers", raw).mean())
    for key in ("answer_type", "question_type"):
        scores |= by_group(hits, [fact.get(key) for fact in questions], f"accuracy:{key}")
    return scores
