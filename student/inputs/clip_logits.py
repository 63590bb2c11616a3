"""Zero-shot logits of CLIP over the answers of a task, computed from cached embeddings.

CLIP-TD compares them with the student's in its confidence weighting (Eq. 9).
"""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from evaluation.metrics.vqa_answers import normalize_answer
from evaluation.models.anchors import three_means
from student.inputs.caches import Source
from student.inputs.questions import QUESTION_TASKS, Question, Task
from student.rows import TeacherLogits
from student.streams import stream
from teachercache.core.errors import UserError
from teachercache.data.manifest import Manifest
from teachercache.search.vectors import unit

MOST = 20_000  # rows from which the anchors are computed, at most
# (rows, their questions) -> logits [n, classes]
ScoreAnswers = Callable[[np.ndarray, Sequence[Question]], Tensor]


class ClipScorer:
    """Computes zero-shot logits from cached embeddings: scaled cosines, or negative distances to anchors.

    Args:
        task: The task of the rows.
        source: A cache with image and text embeddings.
        manifest: All rows of the data.
        rows: Indices of the training rows.
        fields: Names of the two embeddings.
    """

    def __init__(
        self, task: Task, source: Source, manifest: Manifest, rows: np.ndarray, fields: TeacherLogits
    ):
        self.task, self.source, self.fields = task, source, fields
        self.scoring = QUESTION_TASKS[task.name].scoring
        self.scale = float(np.exp(source.constants.get("logit_scale", float(np.log(100)))))
        self.anchors, self.answers = np.empty(0), np.empty(0)
        if self.scoring == "anchors":
            some = np.sort(stream("anchor_rows").permutation(rows)[:MOST])
            self.anchors = find_anchors(self.cosines(some, np.zeros((len(some), 1), int))[:, 0])
        elif self.scoring == "answers":
            labels = manifest.column("label")
            first_row: dict[str, int] = {}  # answer -> the first row with this answer
            for row in rows.tolist():
                first_row.setdefault(normalize_answer(labels[row]), row)
            at = source.at[np.array([first_row[answer] for answer in task.answers])]
            self.answers = unit(source.fields[fields.text][at, 1])  # a row's answer is its second text

    def cosines(self, rows: np.ndarray, places: np.ndarray) -> Float[np.ndarray, "n c"]:
        """Return cosines of each row's picture and its texts at `places` [n, c]."""
        at = self.source.at[rows]
        image = unit(self.source.fields[self.fields.image][at])
        texts = self.source.fields[self.fields.text][at[:, None], places]
        texts = unit(texts.reshape(-1, texts.shape[-1])).reshape(texts.shape)
        return np.einsum("id,icd->ic", image, texts)

    def logits(self, rows: np.ndarray, questions: Sequence[Question]) -> Float[Tensor, "n classes"]:
        """Compute float32 logits over the answers of each row."""
        if self.scoring == "answers":
            scores = unit(self.source.fields[self.fields.image][self.source.at[rows]]) @ self.answers.T
        elif self.scoring == "anchors":
            cosines = self.cosines(rows, np.array([question.places for question in questions]))
            scores = -np.abs(cosines - self.anchors[None, ::-1])  # the highest anchor is entailment
        else:
            scores = self.cosines(rows, np.array([question.answers for question in questions]))
        return torch.from_numpy((self.scale * scores).astype(np.float32))


def find_anchors(cosines: Float[np.ndarray, " n"]) -> Float[np.ndarray, " 3"]:
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


def clip_scorer(
    task: Task,
    sources: Sequence[Source],
    manifest: Manifest,
    rows: np.ndarray,
    fields: TeacherLogits | None,
) -> ScoreAnswers | None:
    """Return a function that computes zero-shot logits from the first cache with both embeddings.

    Return None if `fields` is None or no cache has both.
    """
    if fields is None:
        return None
    source = next((source for source in sources if {fields.image, fields.text} <= set(source.fields)), None)
    return ClipScorer(task, source, manifest, rows, fields).logits if source is not None else None
