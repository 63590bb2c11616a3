"""Kinds of rows that a recipe can train on: pairs, questions and texts.

A recipe fills in one of these records. `student.inputs` contains the pipeline of each kind. It receives the
recipe's settings only through these records.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from teachercache.data.manifest import Manifest

if TYPE_CHECKING:
    from tokenizers import Tokenizer

# (manifest, indices of its training rows) -> indices of the rows to train on
ChooseRows = Callable[[Manifest, np.ndarray], np.ndarray]
# All texts of the training rows -> a tokenizer
MakeTokenizer = Callable[[Sequence[str]], "Tokenizer"]


@dataclasses.dataclass(frozen=True)
class Pairs:
    """Rows of a picture and a text. An epoch shows one text per row, and one stored view if views exist.

    Args:
        ensemble: How several teachers are combined: "average" (fields of teacher k are called `name@k`) or
            "concat" (one wide teacher); "" if the recipe reads a single cache.
        choose_rows: Selects training rows; by default all are used.
    """

    ensemble: str = ""
    choose_rows: ChooseRows | None = None


@dataclasses.dataclass(frozen=True)
class Texts:
    """Rows of a text alone. Unlike `Pairs`, they include rows whose picture cannot be read.

    Args:
        choose_rows: Selects training rows; by default all are used.
    """

    choose_rows: ChooseRows | None = None


@dataclasses.dataclass(frozen=True)
class Words:
    """Cached fields with the selected words of each text.

    Args:
        span: Field with the start and end character of every word [..., words, 2].
        index: Field with the indices of the selected words among these [..., selected], best first, padded
            with -1.
        feature: Field with the teacher's vector of each selected word [..., selected, d].
        number: Number of selected words to use.
    """

    span: str
    index: str
    feature: str
    number: int


@dataclasses.dataclass(frozen=True)
class TeacherLogits:
    """Zero-shot logits of a cached CLIP over the answers, from its image and text embeddings.

    Args:
        image: Field with the image embeddings.
        text: Field with the text embeddings.
    """

    image: str = "image_emb"
    text: str = "text_emb"


@dataclasses.dataclass(frozen=True)
class Questions:
    """Rows of a multiple-choice task: VCR, SNLI-VE, VQA, or a task of your own.

    Args:
        mode: The kind of question, for tasks with several (VCR: "q2a" or "qa2r").
        regime: The labels that may be used: "full", "zero", "low:N" or "semi:N" (N labels of each group).
        subset: Seed that selects the N labels.
        max_text: Longest input in sub-words; longer ones are truncated.
        make_tokenizer: Builds the tokenizer of the inputs; by default with a WordPiece vocabulary of the
            training rows.
        words: Selected words. Their sub-words and cached features enter the batch as `word_tokens` [n, C, m,
            length], `word_valid` [n, C, m] and `word_feature` [n, C, m, d].
        teacher_logits: Add `batch["clip_logits"]` [n, classes].
        adapt: Train on masked words and image-text matching; answers are not used.
        choose_rows: Selects training rows; by default all are used.
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
