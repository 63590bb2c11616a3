"""VQA v2 and OK-VQA by a model that writes its answers (VLKD, 4.3.2): the official soft accuracy of what it wrote.

Not for models that choose among known answers: see `vqa.py`.
"""

import json
from collections import Counter
from typing import Any

import numpy as np

from evaluation.metrics.vqa_answers import soft_accuracy
from evaluation.models.answerer import by_group, rows_to_measure
from evaluation.models.generator import Generator, answer_prompt, written
from teachercache.core.errors import UserError
from teachercache.data.manifest import Manifest

MASKS, BEAMS = 2, 1  # VLKD, table 11
LONGEST = 24  # sub-words


def evaluate(
    generator: Generator,
    manifest: Manifest,
    masks: int = MASKS,
    beams: int = BEAMS,
    *,
    protocol: str = "official",
) -> dict[str, Any]:
    """The soft accuracy, per answer type and question type; `results` in VQA's own form.

    OK-VQA's `answer` is a stem: `accuracy:raw_answer` compares with what people wrote. An answer of no words is wrong.
    `accuracy:always`: of the most frequent answer, always said.
    """
    rows = rows_to_measure(manifest).tolist()
    facts = {row: json.loads(manifest.table["task"][row].as_py() or "{}") for row in rows}
    rows = [row for row in rows if "question" in facts[row]]
    if not rows:
        raise UserError(f"{manifest.data} asks nothing: pass VQA's questions .json")
    prompts = [answer_prompt(facts[row]["question"], masks) for row in rows]
    said, kept, skipped = written(generator, manifest, rows, prompts, beams=beams, longest=LONGEST)
    known = [(text, facts[row]) for text, row in zip(said, kept, strict=True) if facts[row].get("answers")]
    return _scores(known, protocol, manifest.data) | {
        "protocol": protocol,
        "masks": masks,
        "beams": beams,
        "num_rows": len(known),
        "num_different": len(set(said)),
        "num_skipped": len(skipped),
        "results": [
            {"question_id": facts[row].get("id"), "answer": text}
            for row, text in zip(kept, said, strict=True)
        ],
    }


def _scores(known: list[tuple[str, dict[str, Any]]], protocol: str, data: str) -> dict[str, Any]:
    """Accuracies of answers beside what is known of their questions."""
    if not known:
        return {"accuracy": f"skipped: {data} has no answers"}

    def hits(name: str, rows: list[tuple[str, dict[str, Any]]]) -> np.ndarray:
        return np.array([soft_accuracy(text or None, fact[name], protocol) for text, fact in rows])

    found, task = hits("answers", known), [fact for _, fact in known]
    usual = Counter(answer for fact in task for answer in fact["answers"]).most_common(1)[0][0]
    scores = {
        "accuracy": float(found.mean()),
        "accuracy:always": float(hits("answers", [(usual, fact) for fact in task]).mean()),
    }
    if raw := [(text, fact) for text, fact in known if fact.get("raw_answers")]:
        scores["accuracy:raw_answer"] = float(hits("raw_answers", raw).mean())
    scores |= by_group(found, [fact.get("answer_type") for fact in task], "accuracy:answer_type")
    return scores | by_group(found, [fact.get("question_type") for fact in task], "accuracy:question_type")
