"""Turn the texts of rows into the inputs and targets of a sequence-to-sequence student.

Stages: `distil` (BART's infilling of the row's text), `caption` and `scst` ("A picture of [MASK] x m."),
`vqa` ("<question> Answer: [MASK] x m."). The features of pictures come from a cache.
"""

import dataclasses
import json
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor

from evaluation.metrics.vqa_answers import normalize_answer
from evaluation.models.generator import ANSWERING, CAPTIONING, MASK, answer_prompt, caption_prompt
from student.models.seq2seq.infilling import infill
from student.streams import stream
from teachercache.core.errors import UserError
from teachercache.data.manifest import Manifest
from teachercache.data.sample import Sample, clean_texts

STAGES = ("distil", "caption", "vqa", "scst")
NUM_MASKS = {  # VLKD, section 4.3 and table 11
    "distil": CAPTIONING.masks,
    "caption": CAPTIONING.masks,
    "vqa": ANSWERING.masks,
    "scst": CAPTIONING.masks,
}


class Marks(NamedTuple):
    """Ids of a tokenizer's special tokens."""

    begin: int
    pad: int
    end: int
    mask: int


def word_starts(tokenizer: Tokenizer) -> np.ndarray:
    """Return which tokens of a byte-level BPE begin a word: bool [vocabulary]."""
    pieces = [tokenizer.id_to_token(number) or "" for number in range(tokenizer.get_vocab_size())]
    return np.array([piece.startswith("\u0120") for piece in pieces])


def marks_of(tokenizer: Tokenizer) -> Marks:
    """Return the ids of BART's special tokens; UserError if the tokenizer lacks one."""
    names = ("<s>", "<pad>", "</s>", "<mask>")
    ids = [number for name in names if (number := tokenizer.token_to_id(name)) is not None]
    if len(ids) < len(names):
        raise UserError("the tokenizer has no <s>, <pad>, </s> and <mask>: is it BART's?")
    return Marks(*ids)


def encode(tokenizer: Tokenizer, text: str, most: int) -> list[int]:
    """Return the ids of a text without <s> and </s>, at most `most` - 2 of them."""
    return tokenizer.encode(text, add_special_tokens=False).ids[: most - 2]


def encode_prompt(tokenizer: Tokenizer, marks: Marks, prompt: str, most: int) -> tuple[list[int], list[int]]:
    """Encode a prompt; a prompt that is too long loses tokens at its start, never masks.

    Returns:
        The ids of the prompt, and the ids before its first mask, with which the decoder starts.
    """
    before, *others = prompt.split(MASK)
    prefix = tokenizer.encode(before.rstrip(), add_special_tokens=False).ids if before.strip() else []
    rest: list[int] = []
    for text in others:
        rest += [marks.mask, *(tokenizer.encode(text, add_special_tokens=False).ids if text else [])]
    prefix = prefix[max(0, len(prefix) + len(rest) + 2 - most) :]
    return [*prefix, *rest], prefix


def padded(rows: Sequence[Sequence[int]], pad: int) -> Tensor:
    """Return rows of ids as one padded int64 tensor [n, longest]."""
    tensor = torch.full((len(rows), max(map(len, rows))), pad)
    for i, row in enumerate(rows):
        tensor[i, : len(row)] = torch.tensor(row)
    return tensor


@dataclasses.dataclass(frozen=True)
class Reader:
    """Encodes the texts of rows; all random numbers come from one generator per row.

    Args:
        tokenizer: BART's tokenizer.
        marks: Its special tokens.
        starts: bool [vocabulary], from `word_starts`.
        stage: One of STAGES.
        masks: Masks per prompt.
        share: Share of the words that infilling masks.
        max_text: Sub-words per text, at most.
        sampling_steps: scst: random numbers per sampled caption.
    """

    tokenizer: Tokenizer
    marks: Marks
    starts: np.ndarray
    stage: str
    masks: int
    share: float
    max_text: int
    sampling_steps: int = 0

    def __call__(
        self, samples: Sequence[Sample], texts: Sequence[str], random: Sequence[np.random.Generator]
    ) -> dict[str, Tensor]:
        """Return the tensors of the chosen texts.

        Returns:
            `text` [n, L], the target; `source` [n, M], the input with masks; `prompt_length` [n], the number
            of tokens of `text` that the decoder starts with (see `encode_prompt`). scst: also `reference` [n,
            R, W], every caption of the picture, and `sampling_noise` [n, sampling_steps] in [0, 1).
        """
        marks = self.marks
        rows = [
            self.row(sample, text, generator)
            for sample, text, generator in zip(samples, texts, random, strict=True)
        ]
        targets, sources, prompt_lengths = zip(*rows, strict=True)
        batch = {
            name: padded([[marks.begin, *ids, marks.end] for ids in texts_ids], marks.pad)
            for name, texts_ids in (("text", targets), ("source", sources))
        }
        batch["prompt_length"] = torch.tensor(prompt_lengths)
        if self.stage == "scst":
            captions = [
                [encode(self.tokenizer, text, self.max_text) for text in references(sample)]
                for sample in samples
            ]
            most, width = max(map(len, captions)), max(len(ids) for row in captions for ids in row)
            batch["reference"] = torch.full((len(samples), most, width), marks.pad)
            for i, row in enumerate(captions):
                batch["reference"][i, : len(row), : max(map(len, row))] = padded(row, marks.pad)
            noise = [generator.random(self.sampling_steps, np.float32) for generator in random]
            batch["sampling_noise"] = torch.from_numpy(np.stack(noise))
        return batch

    def row(self, sample: Sample, text: str, random: np.random.Generator) -> tuple[list[int], list[int], int]:
        """Return the target, the source and the number of prompt tokens in the target, including <s>."""
        if self.stage == "distil":
            ids = encode(self.tokenizer, text.strip(), self.max_text)
            return ids, infill(ids, self.starts[ids], self.marks.mask, random, share=self.share), 0
        prompt, words = caption_prompt(self.masks), text.strip()
        if self.stage == "vqa":
            question, answers = question_of(sample)
            prompt, words = answer_prompt(question, self.masks), draw_answer(answers, random)
        source, prefix = encode_prompt(self.tokenizer, self.marks, prompt, self.max_text)
        target = [*prefix, *self.tokenizer.encode(f" {words.rstrip('.')}.", add_special_tokens=False).ids]
        return target[: self.max_text - 2], source, len(prefix) + 1


def references(sample: Sample) -> list[str]:
    """Return every usable text of a row."""
    return [text for text, good in clean_texts(sample) if good]


def question_of(sample: Sample) -> tuple[str, Counter]:
    """Return a VQA row's question and the counts of its normalized answers; UserError for other rows."""
    record = json.loads(sample.task or "{}")
    if record.get("task") != "vqa":
        raise UserError(f"row '{sample.key}' asks nothing: stage=vqa takes VQA's questions .json as --data")
    return record["question"], Counter(normalize_answer(answer) for answer in record.get("answers") or ())


def draw_answer(counts: Counter, random: np.random.Generator) -> str:
    """Draw one of the annotators' answers with probability proportional to its count (free choice)."""
    answers = sorted(counts.elements())
    return str(answers[int(random.integers(len(answers)))])


def choose_rows(manifest: Manifest, rows: np.ndarray, stage: str, share: float) -> np.ndarray:
    """Return a share of the rows that a stage can use; a smaller share is a subset of a larger one."""
    if stage == "vqa":
        columns = zip(manifest.column("task"), manifest.column("label"), strict=True)
        rows = rows[np.array(['"vqa"' in task and bool(label) for task, label in columns])[rows]]
        if not len(rows):
            raise UserError(f"{manifest.data} asks nothing: stage=vqa takes VQA's questions .json as --data")
    order = stream("data_share").permutation(len(rows))
    return np.sort(rows[order[: max(1, round(share * len(rows)))]])
