"""What a sequence-to-sequence student reads of a row: the text that it is to write, and that text with holes.

Stages: `distil` (BART's infilling of the row's text), `caption` and `scst` ("A picture of [MASK] x m."), `vqa`
("<question> Answer: [MASK] x m."). Not for pictures, which come from a cache.
"""

import dataclasses
import json
from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
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


def word_starts(tokenizer: Any) -> np.ndarray:
    """Which tokens of a byte-level BPE begin a word: bool [vocabulary]."""
    pieces = [tokenizer.id_to_token(number) or "" for number in range(tokenizer.get_vocab_size())]
    return np.array([piece.startswith("\u0120") for piece in pieces])


def marks_of(tokenizer: Any) -> Marks:
    """BART's special tokens; UserError where the tokenizer has none."""
    found = [tokenizer.token_to_id(name) for name in ("<s>", "<pad>", "</s>", "<mask>")]
    if None in found:
        raise UserError("the tokenizer has no <s>, <pad>, </s> and <mask>: is it BART's?")
    return Marks(*found)


def encode(tokenizer: Any, text: str, most: int) -> list[int]:
    """Ids without <s> and </s>, `most` - 2 of them at most."""
    return tokenizer.encode(text, add_special_tokens=False).ids[: most - 2]


def encode_prompt(tokenizer: Any, marks: Marks, prompt: str, most: int) -> tuple[list[int], list[int]]:
    """Ids of a prompt, and those before its first mask, which the decoder is given.

    A text that is too long loses words at its front, never masks.
    """
    before, *others = prompt.split(MASK)
    given = tokenizer.encode(before.rstrip(), add_special_tokens=False).ids if before.strip() else []
    rest: list[int] = []
    for part in others:
        rest += [marks.mask, *(tokenizer.encode(part, add_special_tokens=False).ids if part else [])]
    given = given[max(0, len(given) + len(rest) + 2 - most) :]
    return [*given, *rest], given


def padded(rows: Sequence[Sequence[int]], pad: int) -> Tensor:
    """Rows of ids as one int64 tensor [n, longest]."""
    found = torch.full((len(rows), max(map(len, rows))), pad)
    for i, row in enumerate(rows):
        found[i, : len(row)] = torch.tensor(row)
    return found


@dataclasses.dataclass(frozen=True)
class Reader:
    """Rows to ids; of random numbers it takes what it is handed, a generator a row."""

    tokenizer: Any
    marks: Marks
    starts: np.ndarray  # bool [vocabulary], `word_starts`
    stage: str
    masks: int  # of a prompt
    share: float  # of the words that infilling takes away
    max_text: int
    sampling_steps: int = 0  # scst: random numbers of a sampled caption

    def __call__(
        self, samples: Sequence[Sample], texts: Sequence[str], random: Sequence[np.random.Generator]
    ) -> dict[str, Tensor]:
        """Return the tensors of the chosen texts.

        Returns:
            `text` [n, L], the text to write; `source` [n, M], the same with masks; `prompt_length` [n], the first
            tokens of `text` that the decoder is given (see `encode_prompt`). scst: also `reference` [n, R, W], every
            caption of the picture, and `sampling_noise` [n, sampling_steps] in [0, 1).
        """
        marks = self.marks
        rows = [self.row(sample, text, one) for sample, text, one in zip(samples, texts, random, strict=True)]
        batch = {
            name: padded([[marks.begin, *row[k], marks.end] for row in rows], marks.pad)
            for k, name in enumerate(("text", "source"))
        }
        batch["prompt_length"] = torch.tensor([row[2] for row in rows])
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
        """What is to be written, what is read, and how many of the first tokens, <s> among them, are given."""
        if self.stage == "distil":
            ids = encode(self.tokenizer, text.strip(), self.max_text)
            return ids, infill(ids, self.starts[ids], self.marks.mask, random, share=self.share), 0
        prompt, words = caption_prompt(self.masks), text.strip()
        if self.stage == "vqa":
            facts = question_of(sample)
            prompt, words = answer_prompt(facts[0], self.masks), draw_answer(facts[1], random)
        source, given = encode_prompt(self.tokenizer, self.marks, prompt, self.max_text)
        target = [*given, *self.tokenizer.encode(f" {words.rstrip('.')}.", add_special_tokens=False).ids]
        return target[: self.max_text - 2], source, len(given) + 1


def references(sample: Sample) -> list[str]:
    """Every usable text of a row."""
    return [text for text, good in clean_texts(sample) if good]


def question_of(sample: Sample) -> tuple[str, Counter]:
    """A VQA row's question and how often each answer, made comparable, was given; UserError where it asks nothing."""
    facts = json.loads(sample.task or "{}")
    if facts.get("task") != "vqa":
        raise UserError(f"row '{sample.key}' asks nothing: stage=vqa takes VQA's questions .json as --data")
    return facts["question"], Counter(normalize_answer(answer) for answer in facts.get("answers") or ())


def draw_answer(counts: Counter, random: np.random.Generator) -> str:
    """One of the ten people's answers, each as likely as it was given (free choice)."""
    answers = sorted(counts.elements())
    return str(answers[int(random.integers(len(answers)))])


def choose_rows(manifest: Manifest, rows: np.ndarray, stage: str, share: float) -> np.ndarray:
    """Rows that a stage can use, and that share of them: the smaller share is part of the larger one."""
    if stage == "vqa":
        columns = zip(manifest.column("task"), manifest.column("label"), strict=True)
        rows = rows[np.array(['"vqa"' in task and bool(label) for task, label in columns])[rows]]
        if not len(rows):
            raise UserError(f"{manifest.data} asks nothing: stage=vqa takes VQA's questions .json as --data")
    order = stream("data_share", 0).permutation(len(rows))
    return np.sort(rows[order[: max(1, round(share * len(rows)))]])
