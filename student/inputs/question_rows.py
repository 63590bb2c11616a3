"""Turn question rows into tensors: token ids, pictures, cached fields and selected words.

Training (`student.inputs.question_batches`) and evaluation (`student.inference.answerer`) share this reader.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from student.contract import RowInputs
from student.inputs.caches import Source
from student.inputs.questions import Mentions, Question, Task
from student.models.single_stream.tokenizer import encode_pairs, tokens_of
from student.rows import Words
from teachercache.core.errors import UserError, name_of
from teachercache.data.manifest import Manifest
from teachercache.data.pictures import read_image
from teachercache.data.sample import BadSample
from teachercache.data.views import check_view

if TYPE_CHECKING:
    from tokenizers import Tokenizer


@dataclasses.dataclass(frozen=True)
class QuestionReader:
    """Reads rows of a task for one student.

    Args:
        manifest: All rows of the data.
        task: The task of the rows.
        sources: Fields of the caches.
        inputs: The inputs of the student.
        tokenizer: Tokenizer of text pairs.
        max_text: Longest input in sub-words.
        words: Fields with the selected words of each input; None for none.
    """

    manifest: Manifest
    task: Task
    sources: Sequence[Source]
    inputs: RowInputs
    tokenizer: "Tokenizer"
    max_text: int
    words: Words | None = None

    def read(self, rows: np.ndarray, questions: Sequence[Question]) -> dict[str, Tensor]:
        """Return token ids, pictures and cached fields of the rows.

        Fields per text contain one entry for each input of a row, so they start with [n, C].
        """
        batch, integers = self.cached(rows, questions)
        if self.inputs.text_pairs:
            batch |= self.texts(questions, batch, integers)
        if self.inputs.picture is not None:
            batch["image"] = self.pictures(rows)
        if self.inputs.tokenize is not None:
            texts = [" ".join(filter(None, pair)) for question in questions for pair in question.parts]
            batch["pair_text"] = self.inputs.tokenize(texts).unflatten(0, (len(rows), -1))
        word_fields = (self.words.span, self.words.index) if self.words is not None else ()
        batch |= {name: torch.from_numpy(ints) for name, ints in integers.items() if name not in word_fields}
        return self.trimmed(batch)

    def cached(
        self, rows: np.ndarray, questions: Sequence[Question]
    ) -> tuple[dict[str, Tensor], dict[str, np.ndarray]]:
        """Return the floating-point fields of the rows as float32, and the integer fields as stored."""
        places = np.array([question.places for question in questions])  # [n, C]
        batch: dict[str, Tensor] = {}
        integers: dict[str, np.ndarray] = {}
        for source in self.sources:
            cache_rows = source.at[rows]
            for name, values in source.fields.items():
                per_text = source.per[name] in ("text", "pair")
                field = values[cache_rows[:, None], places] if per_text else values[cache_rows]
                if field.dtype.kind == "f":
                    batch[name] = torch.from_numpy(np.asarray(field)).float()
                else:
                    integers[name] = field
        return batch, integers

    def trimmed(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return the batch without the padding that none of its rows uses."""
        return batch if self.inputs.trim is None else self.inputs.trim(batch)

    def texts(
        self, questions: Sequence[Question], batch: dict[str, Tensor], integers: Mapping[str, np.ndarray]
    ) -> dict[str, Tensor]:
        """Tokenize the inputs of each row and align selected words with their sub-words.

        Args:
            questions: n questions with C inputs each.
            batch: Cached fields; the feature of the words is moved from here into the result.
            integers: Cached integer fields.

        Returns:
            `text`, `token_type_ids`, `attention_mask` and `text_region` (the region that a sub-word
            mentions), each [n, C, length]; for selected words also `word_tokens` [n, C, m, length],
            `word_valid` [n, C, m] and `word_feature` [n, C, m, d].
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
        """Return the pictures of the rows [n, 3, height, width], for a student that reads pixels."""
        assert self.inputs.picture is not None
        view = self.inputs.picture.view
        samples = [self.manifest.row(row) for row in rows.tolist()]
        try:
            images = (view(read_image(self.manifest, sample)) for sample in samples)
            return torch.stack([check_view(image, None, f"the view {name_of(view)}") for image in images])
        except BadSample as error:
            raise UserError(
                f"a picture of {self.manifest.data} cannot be read: {error}; run `tc build` on it first, to "
                "find such rows"
            ) from error


def regions_of(spans: np.ndarray, mentions: Sequence[Mentions]) -> Tensor:
    """Return the region that each sub-word mentions.

    Args:
        spans: Start and end character of each sub-word [texts, length, 2].
        mentions: Mentions of objects in each text.

    Returns:
        Regions as int64 [texts, length]: k + 1 for object k, 0 for the whole picture.
    """
    regions = np.zeros(spans.shape[:2], np.int64)
    for i, text_mentions in enumerate(mentions):
        if text_mentions:
            table = np.array(text_mentions)
            tokens = tokens_of(spans[i], table[:, :2])  # [mentions, length]
            regions[i] = (tokens * (table[:, 2:] + 1)).max(0)
    return torch.from_numpy(regions)
