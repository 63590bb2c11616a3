"""The contract of a student: what training, checkpoints, evaluation and export ask of it, and nothing else.

A student is a `torch.nn.Module` with the members of `Student`. What it offers beyond training it names in
`capabilities()`; each capability promises the members that its comment lists. A command that needs a missing
capability stops with one line (exit 2) that shows the reason from `limits()`.
"""

import dataclasses
import enum
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
from PIL import Image
from torch import Tensor, nn

from evaluation.models.encoder import Encoder
from teachercache.core.errors import UserError
from teachercache.data.sample import Sample


class Capability(enum.StrEnum):
    """What a student may offer besides being trained."""

    ENCODES = "encode pictures and texts"  # Encodes
    ANSWERS = "answer a task's questions"  # forward returns `logits` [n, classes] of the rows of a task
    GENERATES = "write texts"  # Generates
    EXPORTS_OPEN_CLIP = "be exported for open_clip"  # its Family.export takes the form "open_clip"
    EXPORTS_HF = "be exported for transformers"  # its Family.export takes the form "hf"
    CHECKPOINTS_ACTIVATIONS = "recompute activations in backward"  # CheckpointsActivations
    COMPILES = "be compiled"  # forward has no hooks and no data-dependent control flow
    SHARDS_PARAMETERS = "be trained with ZeRO 3"  # parameters are used inside of forward alone


@dataclasses.dataclass(frozen=True)
class StudentSpec:
    """How a student is built again: run.json keeps it, with its weights in the same folder.

    Args:
        family: A key of `student.models.registry.FAMILIES` or of the entry points `student.models`, each a Family.
        config: JSON types; with the run folder enough for the family to build the module.
        files: More text files of the run folder, by name (a tokenizer.json).
    """

    family: str
    config: Mapping[str, Any]
    files: Mapping[str, str] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class PictureView:
    """How a model sees a picture.

    Args:
        view: RGB picture -> float32 [3, height, width].
        replay: The same for an augmented view, from its stored parameters; None if views cannot be replayed.
        at_least: The decoder may shrink a picture while its shorter side stays this many pixels; 0 for never.
    """

    view: Callable[[Image.Image], Tensor]
    replay: Callable[[Image.Image, np.ndarray], Tensor] | None = None
    at_least: int = 0


# Samples, the text chosen for each, a random generator for each -> named tensors with one entry per sample
ReadTexts = Callable[[Sequence[Sample], Sequence[str], Sequence[np.random.Generator]], dict[str, Tensor]]


@dataclasses.dataclass(frozen=True)
class RowInputs:
    """What a student reads of a row: the entries that its forward finds in the batch.

    Args:
        picture: How it sees the picture, batch["image"]; None if it sees none.
        tokenize: Texts -> token ids [n, length], batch["text"]; on question rows batch["pair_text"] [n, C, length].
        read_texts: Replaces `tokenize` where a row's text becomes several tensors (masked words, prompts).
        text_pairs: On question rows: batch["text"], ["attention_mask"], ["token_type_ids"] [n, C, length], the
            sub-words of each input by the tokenizer of the run.
        fields: Cached teacher fields, by name.
        trim: Batch -> batch without padding that none of its rows uses; by default fields keep their shape.
        mask_noise: Random numbers per picture, batch["mask_noise"] [n, mask_noise] in [0, 1).
    """

    picture: PictureView | None = None
    tokenize: Callable[[list[str]], Tensor] | None = None
    read_texts: ReadTexts | None = None
    text_pairs: bool = False
    fields: tuple[str, ...] = ()
    trim: Callable[[dict[str, Tensor]], dict[str, Tensor]] | None = None
    mask_noise: int = 0


class Student(Protocol):
    """A trainable model. Everything not listed here is `torch.nn.Module`'s own."""

    @property
    def spec(self) -> StudentSpec:
        """How the student is built again."""

    @property
    def row_inputs(self) -> RowInputs:
        """What the student reads of a row."""

    def forward(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Compute the outputs that the recipe's heads and loss read.

        A tensor without dimensions holds for all rows (a logit scale); every other output has one entry per row.
        """

    def capabilities(self) -> frozenset[Capability]:
        """Return what this student offers besides being trained."""

    def limits(self) -> Mapping[Capability, str]:
        """Return reasons for missing capabilities, shown to the user; {} is fine."""

    def __call__(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Call `forward`, as modules do."""

    def parameters(self) -> Iterator[nn.Parameter]:
        """Iterate over the parameters, as modules do."""

    def saved_state(self) -> dict[str, Tensor]:
        """Return the tensors of model.safetensors, each once."""

    def load_saved_state(self, state: Mapping[str, Tensor]) -> None:
        """Load the tensors that `saved_state` returned."""


class Encodes(Protocol):
    """Promised by ENCODES."""

    def encoder(self, name: str, pretrained: str, device: str) -> Encoder:
        """Return this student as the Encoder that `student eval` measures."""


class Generates(Protocol):
    """Promised by GENERATES."""

    def generate_texts(
        self, fields: Mapping[str, Tensor], prompts: Sequence[str], *, num_beams: int, max_new_tokens: int
    ) -> list[str]:
        """Return what each prompt's masks stand for, given the teacher's fields of its picture."""


class CheckpointsActivations(Protocol):
    """Promised by CHECKPOINTS_ACTIVATIONS."""

    def checkpoint_activations(self) -> None:
        """Recompute inner activations in backward instead of keeping them."""


@dataclasses.dataclass(frozen=True)
class ExportRequest:
    """What an export is asked for.

    Args:
        form: "open_clip" or "hf".
        folder: An empty folder to write into; it is renamed when all is checked.
        name: The folder's final name, for the code that loads it.
        run: The content of the run's run.json.
    """

    form: str
    folder: Path
    name: str
    run: Mapping[str, Any]


class Exported(NamedTuple):
    """What an export wrote, for its model card and its users."""

    library: str  # the library that loads it
    usage: str  # code that loads it
    call: str  # one line that loads it, {} for the folder
    notes: list[str]  # what a user of the folder has to know, a line each
    pipeline: str = "zero-shot-image-classification"  # the hub's tag


@dataclasses.dataclass(frozen=True)
class Family:
    """A family of students: how one is built from a run, and how it is exported.

    Args:
        build: A StudentSpec's config, the run folder -> a student with random weights.
        export: Student, request -> what was written; raises UserError if the written folder computes something else
            than the student. None if no member of the family can be exported.
    """

    build: Callable[[Mapping[str, Any], Path], Student]
    export: Callable[[Any, ExportRequest], Exported] | None = None


def require(student: Student, capability: Capability, what: str) -> None:
    """Raise a UserError if the student lacks a capability.

    Args:
        student: The student of a run.
        capability: What the command needs.
        what: The run or option in the user's words; it begins the message.
    """
    if capability not in student.capabilities():
        raise UserError(f"{what}: this student cannot {capability}{reason_against(student, capability)}")


def reason_against(student: Student, capability: Capability) -> str:
    """Return ": reason" of a missing capability, or nothing."""
    reason = student.limits().get(capability, "")
    return f": {reason}" if reason else ""
