"""Batches of question rows; like batches of pairs, a function of the seed and the step alone.

Regions, embeddings and word scores come from caches. No teacher runs, and pictures are decoded only for
students that read pixels.
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

# BERT masks 15 % of the sub-words: 80 % of these become [MASK], 10 % a random word, 10 % stay unchanged
MASKED_SHARE, MASK, OTHER = 0.15, 0.8, 0.1


@dataclasses.dataclass(frozen=True)
class QuestionOrder:
    """The order of the rows that the steps train on.

    Args:
        rows: Order of all rows, or of the labeled half of each batch.
        unlabeled: Order of the unlabeled half (semi:N); None without such a half.
        labeled: True for rows of the manifest whose label may be used, bool [manifest rows].
    """

    rows: Order
    unlabeled: Order | None
    labeled: np.ndarray

    def rows_of(self, step: int) -> np.ndarray:
        """Return the rows of a step's global batch; labeled and unlabeled rows alternate."""
        rows = self.rows.rows_of(step)
        return rows if self.unlabeled is None else np.stack([rows, self.unlabeled.rows_of(step)], 1).ravel()

    def all_rows(self) -> np.ndarray:
        """Return the indices of all rows that are trained on, ascending."""
        orders = [order for order in (self.rows, self.unlabeled) if order is not None]
        return np.sort(np.concatenate([order.rows for order in orders]))


class QuestionBatches(Dataset[dict[str, Tensor]]):
    """Item s is this rank's share of the batch of step s.

    Args:
        reader: Turns rows into tensors.
        order: The rows of each step.
        plan: Steps and ranks.
        score: Computes the zero-shot logits of a teacher; None for none.
        adapt: Make batches for masked words and image-text matching, without answers.
    """

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
        """Return the batch of this rank in a step, or one micro-batch of it."""
        step, share = self.plan.cut(item)
        rows = self.order.rows_of(step)[share]
        samples = [self.manifest.row(row) for row in rows.tolist()]
        questions = [read_question(self.task, sample) for sample in samples]
        if self.adapt:
            return self.adapt_batch(step, rows, samples, questions)
        batch = self.reader.read(rows, questions) | self.targets(rows, questions)
        if self.score is not None:
            batch["clip_logits"] = self.score(rows, questions)
        return batch

    def targets(self, rows: np.ndarray, questions: Sequence[Question]) -> dict[str, Tensor]:
        """Return the labels of a batch.

        Returns:
            `target` [n, classes], how right each class is, all 0 for a row whose label is not used; `labeled`
            [n], 1 for rows whose label is used; `several_right` [n], bool.
        """
        target = torch.zeros(len(rows), self.task.classes)
        for i, question in enumerate(questions):
            for answer, degree in question.target.items():
                target[i, answer] = degree
        labeled = torch.from_numpy(self.order.labeled[rows]).float()
        several_right = torch.full((len(rows),), self.task.several_right)
        return {"target": target * labeled[:, None], "labeled": labeled, "several_right": several_right}

    # ------------------------------------------------------------------------------------------------
    # Adaptive finetuning (CLIP-TD Eq. 11): masked words and mismatched pictures

    def adapt_batch(
        self, step: int, rows: np.ndarray, samples: Sequence[Sample], questions: Sequence[Question]
    ) -> dict[str, Tensor]:
        """Return a batch with one text per row, some of its sub-words masked.

        Half of the rows get the picture fields of a random row.

        Args:
            step: Index of the step.
            rows: Rows of this rank.
            samples: The samples of these rows.
            questions: The questions of these rows.

        Returns:
            The student's inputs, `masked_place` and `masked_word` [n, slots], the positions and ids of the
            masked sub-words, and `matched` [n], 1 if picture and text belong together.
        """
        statements = [
            read_statement(self.task, sample, question, bool(self.order.labeled[row]))
            for row, sample, question in zip(rows.tolist(), samples, questions, strict=True)
        ]
        batch = self.reader.read(rows, statements)
        random = [stream("masked_words", self.plan.seed, step, row) for row in rows.tolist()]
        matched = np.array([generator.random() < 0.5 for generator in random])
        others = np.array([generator.choice(self.rows) for generator in random])
        same_picture = [
            self.picture_of(a) == self.picture_of(b)
            for a, b in zip(rows.tolist(), others.tolist(), strict=True)
        ]
        matched |= np.array(same_picture)
        for name in self.reader.inputs.fields:
            source = next(source for source in self.reader.sources if name in source.fields)
            cache_rows = source.at[np.where(matched, rows, others)]
            batch[name] = torch.from_numpy(source.fields[name][cache_rows]).float()
        batch = self.reader.trimmed(batch)
        masked = [
            self.mask(batch["text"][i, 0], batch["attention_mask"][i, 0], generator)
            for i, generator in enumerate(random)
        ]
        for name, values in zip(("masked_place", "masked_word"), zip(*masked, strict=True), strict=True):
            batch[name] = torch.from_numpy(np.stack(values))
        return batch | {"matched": torch.from_numpy(matched).float()}

    def picture_of(self, row: int) -> tuple[str, int]:
        """Return a key of a row's picture. Rows with the same picture are never used as mismatches."""
        table = self.manifest.table
        return table["image"][row].as_py(), table["offset"][row].as_py()

    def mask(
        self, ids: Tensor, attention_mask: Tensor, random: np.random.Generator
    ) -> tuple[np.ndarray, np.ndarray]:
        """Mask sub-words of one text in place.

        Args:
            ids: Token ids [length], changed in place.
            attention_mask: 1 for sub-words, 0 for padding [length].
            random: The random generator of the row.

        Returns:
            Positions of the masked sub-words, padded with 0, and their original ids, padded with -1.
        """
        tokenizer = self.reader.tokenizer
        slots = max(1, round(MASKED_SHARE * self.reader.max_text))
        mask_id = tokenizer.token_to_id("[MASK]")
        assert mask_id is not None
        special = {tokenizer.token_to_id(name) for name in ("[CLS]", "[SEP]")}
        maskable = [i for i in np.flatnonzero(attention_mask.numpy()).tolist() if int(ids[i]) not in special]
        chosen = [i for i in maskable if random.random() < MASKED_SHARE] or [int(random.choice(maskable))]
        places, words = np.zeros(slots, np.int64), np.full(slots, -1)
        for k, i in enumerate(chosen[:slots]):
            places[k], words[k], draw = i, int(ids[i]), random.random()
            if draw < MASK:
                ids[i] = mask_id
            elif draw < MASK + OTHER:
                ids[i] = int(random.integers(tokenizer.get_vocab_size()))
        return places, words
