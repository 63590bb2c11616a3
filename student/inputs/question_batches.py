"""Batches of question rows; like batches of pairs, a pure function of (seed, step).

Cached regions, embeddings and word scores are read: no teacher runs, and no picture is decoded unless the student
sees pixels.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from student.inputs.clip_logits import ScoreAnswers
from student.inputs.order import MicroBatch, Order, StepPlan
from student.inputs.question_rows import QuestionReader
from student.inputs.questions import Question, read_question, read_statement
from student.streams import stream
from teachercache.data.sample import Sample

# BERT masks 15 % of the sub-words; of these 80 % become [MASK], 10 % another word, 10 % stay
MASKED_SHARE, MASK, OTHER = 0.15, 0.8, 0.1


@dataclasses.dataclass(frozen=True)
class QuestionOrder:
    """Which rows a step trains on.

    Args:
        rows: Order of the rows, or of the labeled half of each batch.
        unlabeled: Order of the unlabeled half (semi:N); None if there is none.
        labeled: Which manifest rows have a label that may be used, bool [manifest rows].
    """

    rows: Order
    unlabeled: Order | None
    labeled: np.ndarray

    def rows_of(self, step: int) -> np.ndarray:
        """Return the rows of the global batch; labeled and unlabeled rows take turns."""
        rows = self.rows.rows_of(step)
        return rows if self.unlabeled is None else np.stack([rows, self.unlabeled.rows_of(step)], 1).ravel()

    def all_rows(self) -> np.ndarray:
        """Return every row that is trained on, ascending."""
        orders = [order for order in (self.rows, self.unlabeled) if order is not None]
        return np.sort(np.concatenate([order.rows for order in orders]))


class QuestionBatches(Dataset[dict[str, Tensor]]):
    """Item s is this rank's part of the batch of step s."""

    num_views = 0

    def __init__(
        self,
        reader: QuestionReader,
        order: QuestionOrder,
        plan: StepPlan,
        *,
        score: ScoreAnswers | None = None,
        adapt: bool = False,
    ):
        self.reader, self.order, self.plan, self.score, self.adapt = reader, order, plan, score, adapt
        self.manifest, self.task, self.rows = reader.manifest, reader.task, order.all_rows()

    def __len__(self) -> int:
        return self.plan.steps

    def __getitem__(self, item: int | MicroBatch) -> dict[str, Tensor]:
        """Return the rows of this rank in a step, or those of a micro-batch."""
        step, part = self.plan.cut(item)
        rows = self.order.rows_of(step)[part]
        samples = [self.manifest.row(row) for row in rows.tolist()]
        questions = [read_question(self.task, sample) for sample in samples]
        if self.adapt:
            return self.adapt_batch(step, rows, samples, questions)
        batch = self.reader.read(rows, questions) | self.targets(rows, questions)
        if self.score is not None:
            batch["clip_logits"] = self.score(rows, questions)
        return batch

    def targets(self, rows: np.ndarray, questions: Sequence[Question]) -> dict[str, Tensor]:
        """Return `target` [n, classes], all 0 for a row whose label is not used; `labeled` [n]; `several_right` [n]."""
        target = torch.zeros(len(rows), self.task.classes)
        for i, question in enumerate(questions):
            for place, right in question.target.items():
                target[i, place] = right
        labeled = torch.from_numpy(self.order.labeled[rows]).float()
        several_right = torch.full((len(rows),), self.task.several_right)
        return {"target": target * labeled[:, None], "labeled": labeled, "several_right": several_right}

    # ------------------------------------------------------------------------------------------------
    # Adaptive finetuning (CLIP-TD Eq. 11): masked words, and pictures that do not belong to the text

    def adapt_batch(
        self, step: int, rows: np.ndarray, samples: Sequence[Sample], questions: Sequence[Question]
    ) -> dict[str, Tensor]:
        """Return one text per row; half of the rows get another row's picture fields, some sub-words are masked."""
        statements = [
            read_statement(self.task, sample, question, bool(self.order.labeled[row]))
            for row, sample, question in zip(rows.tolist(), samples, questions, strict=True)
        ]
        batch = self.reader.read(rows, statements)
        random = [stream("masked_words", self.plan.seed, step, row) for row in rows.tolist()]
        matched = np.array([generator.random() < 0.5 for generator in random])
        others = np.array([generator.choice(self.rows) for generator in random])
        same = [
            self.picture_of(a) == self.picture_of(b)
            for a, b in zip(rows.tolist(), others.tolist(), strict=True)
        ]
        matched |= np.array(same)
        for name in self.reader.inputs.fields:
            source = next(source for source in self.reader.sources if name in source.fields)
            at = source.at[np.where(matched, rows, others)]
            batch[name] = torch.from_numpy(source.fields[name][at]).float()
        batch = self.reader.trimmed(batch)
        masked = [
            self.mask(batch["text"][i, 0], batch["attention_mask"][i, 0], generator)
            for i, generator in enumerate(random)
        ]
        for name, values in zip(("masked_place", "masked_word"), zip(*masked, strict=True), strict=True):
            batch[name] = torch.from_numpy(np.stack(values))
        return batch | {"matched": torch.from_numpy(matched).float()}

    def picture_of(self, row: int) -> tuple[str, int]:
        """Return what identifies a row's picture: other questions about it are no mismatches."""
        table = self.manifest.table
        return table["image"][row].as_py(), table["offset"][row].as_py()

    def mask(
        self, ids: Tensor, attention_mask: Tensor, random: np.random.Generator
    ) -> tuple[np.ndarray, np.ndarray]:
        """Mask sub-words of one text in place; return their places and ids, padded with 0 and -1."""
        tokenizer = self.reader.tokenizer
        slots = max(1, round(MASKED_SHARE * self.reader.max_text))
        special = {tokenizer.token_to_id(name) for name in ("[CLS]", "[SEP]")}
        free = [i for i in np.flatnonzero(attention_mask.numpy()).tolist() if int(ids[i]) not in special]
        chosen = [i for i in free if random.random() < MASKED_SHARE] or [int(random.choice(free))]
        places, words = np.zeros(slots, np.int64), np.full(slots, -1)
        for k, i in enumerate(chosen[:slots]):
            places[k], words[k], draw = i, int(ids[i]), random.random()
            if draw < MASK:
                ids[i] = tokenizer.token_to_id("[MASK]")
            elif draw < MASK + OTHER:
                ids[i] = int(random.integers(tokenizer.get_vocab_size()))
        return places, words
