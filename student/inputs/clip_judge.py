"""CLIP's own logits over the answers of a task, from cached embeddings: what confidence weighting compares (Eq. 9).

Not for measuring CLIP itself: see `evaluation.tasks.registry`.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float

from evaluation.metrics.vqa_answers import normalize_answer
from evaluation.models.anchors import three_means
from student.inputs.caches import Source
from student.inputs.questions import Question, Task
from teachercache.core.errors import UserError
from teachercache.data.manifest import Manifest
from teachercache.search.vectors import unit

MOST = 20_000  # rows that SNLI-VE's anchors are found in


class Judge:
    """`logits(rows, questions)` [n, classes]: CLIP's scale times cosines, or minus distances to SNLI-VE's anchors."""

    def __init__(self, task: Task, source: Source, manifest: Manifest, rows: np.ndarray):
        self.task, self.source = task, source
        self.scale = float(np.exp(source.constants.get("logit_scale", np.log(100))))
        self.anchors, self.answers = np.empty(0), np.empty(0)
        if task.name == "snli_ve":
            some = np.random.default_rng(0).permutation(rows)[:MOST]
            self.anchors = find_anchors(self.near(np.sort(some), np.zeros((len(some), 1), int))[:, 0])
        elif task.name == "vqa":
            self.answers = answer_rows(task, source, manifest, rows)

    def near(self, rows: np.ndarray, places: np.ndarray) -> Float[np.ndarray, "n c"]:
        """Cosines of each row's picture and its texts at `places` [n, c]."""
        at = self.source.at[rows]
        image = unit(self.source.fields["image_emb"][at])
        texts = self.source.fields["text_emb"][at[:, None], places]
        return np.einsum("id,icd->ic", image, unit(texts.reshape(-1, texts.shape[-1])).reshape(texts.shape))

    def logits(self, rows: np.ndarray, questions: Sequence[Question]) -> torch.Tensor:
        """CLIP's logits of each row's answers, float32."""
        if self.task.name == "vqa":
            found = unit(self.source.fields["image_emb"][self.source.at[rows]]) @ self.answers.T
        elif self.task.name == "snli_ve":
            near = self.near(rows, np.array([question.places for question in questions]))
            found = -np.abs(near - self.anchors[None, ::-1])  # the highest anchor is entailment
        else:
            found = self.near(rows, np.array([question.answers for question in questions]))
        return torch.from_numpy((self.scale * found).astype(np.float32))


def find_anchors(cosines: np.ndarray) -> Float[np.ndarray, " 3"]:
    """Return SNLI-VE's anchors, lowest first: contradiction, neutral, entailment (CLIP-TD, section 4.2.1).

    Raises:
        UserError: If there are fewer than three distinct cosines.
    """
    anchors = three_means(cosines)
    if anchors is None:
        raise UserError(
            f"{len(cosines)} rows of SNLI-VE are too few or too alike for three anchors: take more, or add "
            "--set confidence=false"
        )
    return anchors


def answer_rows(
    task: Task, source: Source, manifest: Manifest, rows: np.ndarray
) -> Float[np.ndarray, "answers d"]:
    """The text embedding of each answer of the vocabulary: of the first row that has it (at place 1 in VQA)."""
    labels = manifest.column("label")
    first: dict[str, int] = {}
    for row in rows.tolist():
        first.setdefault(normalize_answer(labels[row]), row)
    at = source.at[np.array([first[answer] for answer in task.answers])]
    return unit(source.fields["text_emb"][at, 1])


def find_judge(
    task: Task, sources: Sequence[Source], manifest: Manifest, rows: np.ndarray, *, asked: bool
) -> Any:
    """A Judge where confidence weighting asks for one."""
    found = next((source for source in sources if {"image_emb", "text_emb"} <= set(source.fields)), None)
    return Judge(task, found, manifest, rows) if asked and found is not None else None
