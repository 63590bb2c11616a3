"""From questions and caches to batches for single-stream students; like `batches`, a pure function of (seed, step).

No picture is decoded (but for a CLIP that is tuned) and no teacher runs: regions, embeddings and word scores are
read. Not for choosing rows: see `prepare_task`.
"""

import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from student.inputs.caches import Source
from student.inputs.order import Order
from student.inputs.questions import Mentions, Question, Task, read_question
from student.models.single_stream.tokenizer import encode_pairs, tokens_of
from teachercache.core.errors import UserError
from teachercache.data.manifest import Manifest
from teachercache.data.pictures import read_image
from teachercache.data.sample import BadSample, Sample

MASKED_SHARE, MASK, OTHER = (
    0.15,
    0.8,
    0.1,
)  # BERT: of the masked places 80 % [MASK], 10 % another word, 10 % as it was


class TaskBatches(Dataset):
    """Item s is this rank's part of the batch of step s."""

    num_views = 0  # no pictures, so no views of them

    def __init__(
        self,
        manifest: Manifest,
        task: Task,
        *,
        sources: list[Source],
        order: Order | None,
        labelled: np.ndarray,
        tokenizer: Any,
        constants: Any,
        student: Any,
        judge: Any = None,
        steps: int,
        seed: int,
        unlabelled: Order | None = None,
        rank: int = 0,
        world: int = 1,
    ):
        self.manifest, self.task, self.sources, self.order, self.unlabelled = (
            manifest,
            task,
            sources,
            order,
            unlabelled,
        )
        self.labelled, self.tokenizer, self.constants, self.judge = labelled, tokenizer, constants, judge
        self.student, self.steps, self.seed, self.rank, self.world = student, steps, seed, rank, world
        self.batch = (order.batch if order else 0) + (unlabelled.batch if unlabelled else 0)
        self.rows = np.sort(
            np.concatenate([one.rows for one in (order, unlabelled) if one] or [np.empty(0, int)])
        )

    def __len__(self) -> int:
        return self.steps

    def rows_of(self, step: int) -> np.ndarray:
        """Rows of the global batch: where some have labels and some have not, they take turns."""
        rows = self.order.rows_of(step)
        return rows if self.unlabelled is None else np.stack([rows, self.unlabelled.rows_of(step)], 1).ravel()

    def __getitem__(self, item: int | tuple[int, int, int]) -> dict[str, torch.Tensor]:
        """The rows of this rank in a step; of (step, first, last) those of its rows alone, a micro-batch."""
        share = self.batch // self.world
        step, first, last = item if isinstance(item, tuple) else (item, 0, share)
        rows = self.rows_of(step)[self.rank * share : (self.rank + 1) * share][first:last]
        samples = [self.manifest.row(row) for row in rows.tolist()]
        questions = [read_question(self.task, sample) for sample in samples]
        if self.constants.stage == "adapt":
            return self.adapt_batch(step, rows, samples, questions)
        batch = self.read(rows, questions)
        batch |= self.targets(rows, questions)
        if self.judge is not None:
            batch["clip_logits"] = self.judge.logits(rows, questions)
        return batch

    def read(self, rows: np.ndarray, questions: list[Question]) -> dict[str, torch.Tensor]:
        """Token ids, regions and the teacher's fields; of fields per text those of each row's inputs."""
        batch: dict[str, Any] = {}
        places = np.array([question.places for question in questions])  # [n, C]
        for source in self.sources:
            at = source.at[rows]
            for name, values in source.fields.items():
                found = values[at[:, None], places] if source.per[name] in ("text", "pair") else values[at]
                batch[name] = (
                    torch.from_numpy(np.asarray(found)).float() if found.dtype.kind == "f" else found
                )
        if "text" in self.student.inputs:
            batch |= self.texts(questions, batch)
        if "image" in self.student.inputs:
            batch |= self.pictures(rows, questions)
        for name in ("word_span", "word_index", "random_index", "random_feature"):
            batch.pop(name, None)
        return self.trimmed(batch)

    def trimmed(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Without the places for regions that no row of this batch has."""
        if "region_box" in batch:
            there = (batch["region_box"][..., 2] > batch["region_box"][..., 0]).any(0)
            most = int(there.nonzero().max()) + 1 if there.any() else 1
            batch |= {name: batch[name][:, :most] for name in ("region_feature", "region_box")}
        return batch

    def texts(self, questions: list[Question], batch: dict[str, Any]) -> dict[str, torch.Tensor]:
        """`text`, `second`, `there`, `text_region` (what a sub-word speaks of) [n, C, length]; selected words.

        Of those `word_tokens` [n, C, m, length], `word_there` [n, C, m] and `word_feature` [n, C, m, d].
        """
        n, C = len(questions), len(questions[0].parts)
        pairs = [pair for question in questions for pair in question.parts]
        encoded = encode_pairs(self.tokenizer, pairs, self.constants.max_text)
        found = {"text": encoded.ids, "second": encoded.second, "there": encoded.there}
        found["text_region"] = regions_of(
            encoded.spans, [one for question in questions for one in question.mentions]
        )
        found = {name: value.unflatten(0, (n, C)) for name, value in found.items()}
        if "word_span" not in batch:
            return found
        kind = "random" if "random_index" in batch else "word"
        index = batch[f"{kind}_index"][..., : self.constants.m].astype(np.int64)  # [n, C, m]
        spans = np.take_along_axis(batch["word_span"], np.maximum(index, 0)[..., None], 2)  # [n, C, m, 2]
        spans = np.where(index[..., None] < 0, 0, spans).reshape(n * C, -1, 2)
        tokens = np.stack([tokens_of(*pair) for pair in zip(encoded.spans, spans, strict=True)])
        tokens = torch.from_numpy(tokens).unflatten(0, (n, C))
        feature = batch[f"{kind}_feature"][..., : self.constants.m, :]
        return found | {"word_tokens": tokens, "word_there": tokens.any(-1).float(), "word_feature": feature}

    def pictures(self, rows: np.ndarray, questions: list[Question]) -> dict[str, torch.Tensor]:
        """`image` and `pair_text`, for a student that is a CLIP: the one that decodes."""
        samples = [self.manifest.row(row) for row in rows.tolist()]
        try:
            image = torch.stack([self.student.view(read_image(self.manifest, sample)) for sample in samples])
        except BadSample as error:
            raise UserError(
                f"a picture of {self.manifest.data} cannot be read: {error}; `tc build` on it first, which "
                "finds such rows"
            ) from error
        texts = [" ".join(part for part in pair if part) for question in questions for pair in question.parts]
        return {"image": image, "pair_text": self.student.tokenizer(texts).unflatten(0, (len(rows), -1))}

    def targets(self, rows: np.ndarray, questions: list[Question]) -> dict[str, torch.Tensor]:
        """`target` [n, classes], all 0 for a row whose label is not used, `labelled` [n] 0 or 1, `many` [n]."""
        target = torch.zeros(len(rows), self.task.classes)
        for i, question in enumerate(questions):
            for place, right in question.target.items():
                target[i, place] = right
        labelled = torch.from_numpy(self.labelled[rows]).float()
        many = torch.full((len(rows),), self.task.name == "vqa")
        return {"target": target * labelled[:, None], "labelled": labelled, "many": many}

    # ------------------------------------------------------------------------------------------------
    # Adaptive finetuning (Eq. 11): masked words, and pictures that do not belong

    def adapt_batch(
        self, step: int, rows: np.ndarray, samples: list[Sample], questions: list[Question]
    ) -> dict[str, torch.Tensor]:
        """One text a row; of half of the rows another row's regions, some sub-words masked."""
        shown = [
            self.statement(row, sample, question)
            for row, sample, question in zip(rows.tolist(), samples, questions, strict=True)
        ]
        batch = self.read(rows, shown)
        random = [np.random.default_rng([self.seed, step, row, 2]) for row in rows.tolist()]
        matched = np.array([one.random() < 0.5 for one in random])
        others = np.array([one.choice(self.rows) for one in random])
        pictures = (
            [self.picture_of(row) for row in rows.tolist()],
            [self.picture_of(row) for row in others.tolist()],
        )
        matched |= np.array([a == b for a, b in zip(*pictures, strict=True)])
        source = next(source for source in self.sources if "region_feature" in source.fields)
        at = source.at[np.where(matched, rows, others)]
        batch |= {
            name: torch.from_numpy(source.fields[name][at]).float()
            for name in ("region_feature", "region_box")
        }
        batch = self.trimmed(batch)
        masked = [self.mask(batch["text"][i, 0], batch["there"][i, 0], one) for i, one in enumerate(random)]
        for name, values in zip(("masked_place", "masked_word"), zip(*masked, strict=True), strict=True):
            batch[name] = torch.from_numpy(np.stack(values))
        return batch | {"matched": torch.from_numpy(matched).float()}

    def statement(self, row: int, sample: Sample, question: Question) -> Question:
        """What is said of the picture as far as it may be known: the right choice, or the question alone."""
        kinds = json.loads(sample.task)["texts"]
        if self.task.name == "vcr" and not self.labelled[row]:
            place, text = kinds.index("question"), sample.texts[kinds.index("question")].strip()
            named = tuple(one for one in question.mentions[0] if one[1] <= len(text))
            return Question(((text, ""),), (place,), (), {}, False, "", (named,))
        k = max(question.target, key=question.target.__getitem__) if self.task.name == "vcr" else 0
        return Question(
            (question.parts[k],), (question.places[k],), (), {}, False, "", question.mentions[k : k + 1]
        )

    def picture_of(self, row: int) -> tuple[str, int]:
        """Which picture a row has: other questions about it are no strangers."""
        table = self.manifest.table
        return table["image"][row].as_py(), table["offset"][row].as_py()

    def mask(self, ids: torch.Tensor, there: torch.Tensor, random: Any) -> tuple[np.ndarray, np.ndarray]:
        """Mask sub-words of one text in place; their places and what they were, padded with 0 and -1."""
        slots = max(1, round(MASKED_SHARE * self.constants.max_text))
        special = {self.tokenizer.token_to_id(name) for name in ("[CLS]", "[SEP]")}
        free = [i for i in np.flatnonzero(there.numpy()).tolist() if int(ids[i]) not in special]
        chosen = [i for i in free if random.random() < MASKED_SHARE] or [int(random.choice(free))]
        place, word = np.zeros(slots, np.int64), np.full(slots, -1)
        for k, i in enumerate(chosen[:slots]):
            place[k], word[k], chance = i, int(ids[i]), random.random()
            if chance < MASK:
                ids[i] = self.tokenizer.token_to_id("[MASK]")
            elif chance < MASK + OTHER:
                ids[i] = int(random.integers(self.tokenizer.get_vocab_size()))
        return place, word


def regions_of(spans: np.ndarray, mentions: Sequence[Mentions]) -> torch.Tensor:
    """The region that each sub-word speaks of, int64 [texts, length]: object k is region k + 1, 0 the whole picture."""
    found = np.zeros(spans.shape[:2], np.int64)
    for i, named in enumerate(mentions):
        if named:
            said = np.array(named)
            tokens = tokens_of(spans[i], said[:, :2])  # [mentions, length]
            found[i] = (tokens * (said[:, 2:] + 1)).max(0)
    return torch.from_numpy(found)
