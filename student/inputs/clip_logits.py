"""Zero-shot logits of CLIP over the answers of a task, computed from cached embeddings.

CLIP-TD compares them with the student's in its confidence weighting (Eq. 9).
"""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from evaluation.metrics.vqa_answers import normalise_answer
from student.inputs.caches import Source
from student.inputs.questions import QUESTION_TASKS, Question, Task
from student.rows import TeacherLogits
from student.streams import stream
from teachercache.core.errors import UserError
from teachercache.data.manifest import Manifest

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
            sampled = np.sort(stream("anchor_rows", 0).permutation(rows)[:MOST])
            self.anchors = three_means(self.cosines(sampled, np.zeros((len(sampled), 1), int))[:, 0])
        elif self.scoring == "answers":
            labels = manifest.column("label")
            first_row: dict[str, int] = {}  # answer -> the first row with this answer
            for row in rows.tolist():
                first_row.setdefault(normalise_answer(labels[row]), row)
            cache_rows = source.at[np.array([first_row[answer] for answer in task.answers])]
            # A row's answer is its second text
            self.answers = unit(source.fields[fields.text][cache_rows, 1])

    def cosines(self, rows: np.ndarray, places: np.ndarray) -> Float[np.ndarray, "n c"]:
        """Compute the cosines of each row's picture with those of its texts that `places` [n, c] indexes."""
        cache_rows = self.source.at[rows]
        image = unit(self.source.fields[self.fields.image][cache_rows])
        text = unit(self.source.fields[self.fields.text][cache_rows[:, None], places])
        return np.einsum("id,icd->ic", image, text)

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


def unit(rows: Float[np.ndarray, "... d"]) -> Float[np.ndarray, "... d"]:
    """Normalize vectors to unit length, in float32."""
    rows = np.asarray(rows, np.float32)
    return rows / np.maximum(np.linalg.norm(rows, axis=-1, keepdims=True), 1e-12)


def three_means(values: Float[np.ndarray, " n"]) -> Float[np.ndarray, " 3"]:
    """Return three k-means centers, ascending: contradiction, neutral, entailment (section 4.2.1)."""
    if len(np.unique(values)) < 3:
        raise UserError(
            f"{len(values)} rows of SNLI-VE are too few or too alike for three anchors: take more, or add "
            "--set confidence=false"
        )
    try:
        from sklearn.cluster import KMeans
    except ImportError as error:
        raise UserError(
            "the anchors of SNLI-VE need scikit-learn: pip install 'teachercache[eval]'"
        ) from error
    return np.sort(KMeans(3, n_init=10, random_state=0).fit(values[:, None]).cluster_centers_[:, 0])


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
