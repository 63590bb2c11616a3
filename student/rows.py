"""Kinds of rows that a recipe can train on: pairs, questions, texts. Frozen records that a recipe fills in.

`student.inputs` has the pipeline of each kind. A setting reaches it as an argument of one of these records.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from teachercache.data.manifest import Manifest

# All training rows of a manifest -> those to train on
ChooseRows = Callable[[Manifest, np.ndarray], np.ndarray]
# Every text of the training rows -> a `tokenizers.Tokenizer`
MakeTokenizer = Callable[[Sequence[str]], Any]


@dataclasses.dataclass(frozen=True)
class Pairs:
    """Rows of a picture and a text: one text of each row and epoch, one stored view where there are views.

    Args:
        ensemble: How several teachers are joined: "average" (fields of teacher k are called `name@k`) or "concat"
            (one wide teacher); "" if the recipe reads a single cache.
        choose_rows: Leaves out training rows; by default none.
    """

    ensemble: str = ""
    choose_rows: ChooseRows | None = None


@dataclasses.dataclass(frozen=True)
class Texts:
    """Rows of a text alone: as `Pairs`, but rows without a readable picture are used too."""

    choose_rows: ChooseRows | None = None


@dataclasses.dataclass(frozen=True)
class Words:
    """Selected words of each text, from a cache.

    Args:
        span: Field with the characters of every word [..., words, 2].
        index: Field with the places of selected words among them [..., selected], best first, -1 for none.
        feature: Field with the teacher's vector of each selected word [..., selected, d].
        number: How many of them to take.
    """

    span: str
    index: str
    feature: str
    number: int


@dataclasses.dataclass(frozen=True)
class TeacherLogits:
    """A cached CLIP's own logits over the answers, from its image and text embeddings."""

    image: str = "image_emb"
    text: str = "text_emb"


@dataclasses.dataclass(frozen=True)
class Questions:
    """Rows of a task with answers to choose from: VCR, SNLI-VE, VQA, or a task of your own.

    Args:
        mode: Which of a task's questions, where it has several (VCR: "q2a" or "qa2r").
        regime: "full", "zero", "low:N" or "semi:N", the labels that may be used (N of each group).
        subset: Seed of the N labels.
        max_text: Sub-words per input; longer inputs are cut.
        make_tokenizer: Tokenizer of the inputs; by default a WordPiece vocabulary of the training rows.
        words: Selected words, whose sub-words and cached features go into the batch as `word_tokens` [n, C, m,
            length], `word_valid` [n, C, m] and `word_feature` [n, C, m, d].
        teacher_logits: Add batch["clip_logits"] [n, classes].
        adapt: Train on masked words and image-text matching instead of on answers.
        choose_rows: Leaves out training rows; by default none.
    """

    mode: str = ""
    regime: str = "full"
    subset: int = 0
    max_text: int = 96
    make_tokenizer: MakeTokenizer | None = None
    words: Words | None = None
    teacher_logits: TeacherLogits | None = None
    adapt: bool = False
    choose_rows: ChooseRows | None = None


RowPlan = Pairs | Questions | Texts
