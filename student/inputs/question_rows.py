"""Question rows as tensors: token ids, the student's pictures and cached fields, selected words.

Training (`student.inputs.question_batches`) and evaluation (`student.inference.answerer`) read rows through it.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from student.contract import RowInputs
from student.inputs.caches import Source
from student.inputs.questions import Mentions, Question, Task
from student.models.single_stream.tokenizer import encode_pairs, tokens_of
from student.rows import Words
from teachercache.core.errors import UserError
from teachercache.data.manifest import Manifest
from teachercache.data.pictures import read_image
from teachercache.data.sample import BadSample


@dataclasses.dataclass(frozen=True)
class QuestionReader:
    """Reads rows of a task for one student.

    Args:
        manifest: All rows.
        task: What they ask.
        sources: The caches' fields.
        inputs: What the student reads.
        tokenizer: The `tokenizers.Tokenizer` of text pairs.
        max_text: Sub-words per input.
        words: Selected words of each input; None for none.
    """

    manifest: Manifest
    task: Task
    sources: Sequence[Source]
    inputs: RowInputs
    tokenizer: Any
    max_text: int
    words: Words | None = None

    def read(self, rows: np.ndarray, questions: Sequence[Question]) -> dict[str, Tensor]:
        """Return token ids, pictures and cached fields; of fields per text, those of each row's inputs."""
        batch, integers = self.cached(rows, questions)
        if self.inputs.text_pairs:
            batch |= self.texts(questions, batch, integers)
        if self.inputs.picture is not None:
            batch["image"] = self.pictures(rows)
        if self.inputs.tokenize is not None:
            texts = [" ".join(filter(None, pair)) for question in questions for pair in question.parts]
            batch["pair_text"] = self.inputs.tokenize(texts).unflatten(0, (len(rows), -1))
        of_words = (self.words.span, self.words.index) if self.words is not None else ()
        batch |= {name: torch.from_numpy(ints) for name, ints in integers.items() if name not in of_words}
        return self.trimmed(batch)

    def cached(
        self, rows: np.ndarray, questions: Sequence[Question]
    ) -> tuple[dict[str, Tensor], dict[str, np.ndarray]]:
        """Return the floating-point fields of the rows as float32, and the integer fields as they are stored."""
        places = np.array([question.places for question in questions])  # [n, C]
        batch: dict[str, Tensor] = {}
        integers: dict[str, np.ndarray] = {}
        for source in self.sources:
            at = source.at[rows]
            for name, values in source.fields.items():
                per_text = source.per[name] in ("text", "pair")
                field = values[at[:, None], places] if per_text else values[at]
                if field.dtype.kind == "f":
                    batch[name] = torch.from_numpy(np.asarray(field)).float()
                else:
                    integers[name] = field
        return batch, integers

    def trimmed(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return the batch without padding that no row of it uses."""
        return batch if self.inputs.trim is None else self.inputs.trim(batch)

    def texts(
        self, questions: Sequence[Question], batch: dict[str, Tensor], integers: Mapping[str, np.ndarray]
    ) -> dict[str, Tensor]:
        """Return `text`, `token_type_ids`, `attention_mask`, `text_region` [n, C, length], and selected words.

        `text_region` is the region that a sub-word mentions. Words: `word_tokens` [n, C, m, length], `word_valid`
        [n, C, m] and `word_feature` [n, C, m, d].
        """
        n, C = len(questions), len(questions[0].parts)
        pairs = [pair for question in questions for pair in question.parts]
        encoded = encode_pairs(self.tokenizer, pairs, self.max_text)
        mentions = [mentions for question in questions for mentions in question.mentions]
        fields = {
            "text": encoded.ids,
            "token_type_ids": encoded.token_type_ids,
            "attention_mask": encoded.attention_mask,
            "text_region": regions_of(encoded.spans, mentions),
        }
        fields = {name: value.unflatten(0, (n, C)) for name, value in fields.items()}
        words = self.words
        if words is None or words.index not in integers:
            return fields
        index = integers[words.index][..., : words.number].astype(np.int64)  # [n, C, m]
        spans = np.take_along_axis(integers[words.span], np.maximum(index, 0)[..., None], 2)  # [n, C, m, 2]
        spans = np.where(index[..., None] < 0, 0, spans).reshape(n * C, -1, 2)
        tokens = np.stack([tokens_of(*pair) for pair in zip(encoded.spans, spans, strict=True)])
        fields["word_tokens"] = torch.from_numpy(tokens).unflatten(0, (n, C))
        fields["word_valid"] = fields["word_tokens"].any(-1).float()
        fields["word_feature"] = batch.pop(words.feature)[..., : words.number, :]
        return fields

    def pictures(self, rows: np.ndarray) -> Tensor:
        """Return decoded pictures [n, 3, height, width], for a student that sees pixels."""
        assert self.inputs.picture is not None
        view = self.inputs.picture.view
        samples = [self.manifest.row(row) for row in rows.tolist()]
        try:
            return torch.stack([view(read_image(self.manifest, sample)) for sample in samples])
        except BadSample as error:
            raise UserError(
                f"a picture of {self.manifest.data} cannot be read: {error}; run `tc build` on it first, which "
                "finds such rows"
            ) from error


def regions_of(spans: np.ndarray, mentions: Sequence[Mentions]) -> Tensor:
    """Return the region that each sub-word mentions, int64 [texts, length].

    Object k is region k + 1; 0 is the whole picture.
    """
    regions = np.zeros(spans.shape[:2], np.int64)
    for i, of_text in enumerate(mentions):
        if of_text:
            table = np.array(of_text)
            tokens = tokens_of(spans[i], table[:, :2])  # [mentions, length]
            regions[i] = (tokens * (table[:, 2:] + 1)).max(0)
    return torch.from_numpy(regions)
