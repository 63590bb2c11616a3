"""The contract of a student: every member that training, checkpoints, evaluation and export use.

A student is a `torch.nn.Module` with the members of `Student`. Its `capabilities()` name what it supports
beyond training; each capability promises the members listed in its comment. A command that needs a missing
capability stops with one line (exit code 2) that includes the reason from `limits()`.
"""

import dataclasses
import enum
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol, Self

import numpy as np
from PIL import Image
from torch import Tensor, nn

from evaluation.models.encoder import Encoder
from teachercache.core.errors import UserError
from teachercache.data.sample import Sample


class Capability(enum.StrEnum):
    """What a student can support beyond training. The values complete "this student cannot ..."."""

    ENCODES = "encode pictures and texts"  # has the members of Encodes
    ANSWERS = "answer a task's questions"  # forward returns `logits` [n, classes] for the rows of a task
    GENERATES = "write texts"  # has the members of Generates
    EXPORTS_OPEN_CLIP = "be exported for open_clip"  # its Family.export accepts the form "open_clip"
    EXPORTS_HF = "be exported for transformers"  # its Family.export accepts the form "hf"
    CHECKPOINTS_ACTIVATIONS = "recompute activations in backward"  # has the members of CheckpointsActivations
    COMPILES = "be compiled"  # forward has no hooks and no data-dependent control flow
    SHARDS_PARAMETERS = "be trained with ZeRO 3"  # parameters are used only inside forward


@dataclasses.dataclass(frozen=True)
class StudentSpec:
    """A description from which a student is rebuilt. run.json stores it; the weights lie in the same folder.

    Args:
        family: A key of `student.models.registry.FAMILIES` or the name of an entry point in the group
            `student.models`; either one gives a Family.
        config: JSON types. Together with the run folder they are enough for the family to build the module.
        files: Contents of further text files in the run folder, by file name (such as tokenizer.json).
    """

    family: str
    config: Mapping[str, Any]
    files: Mapping[str, str] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class PictureView:
    """The preprocessing of a picture for one model.

    Args:
        view: Maps an RGB picture to float32 [3, height, width].
        replay: Maps an RGB picture and the stored parameters of an augmented view to float32 [3, height,
            width]; None if the model cannot replay views.
        at_least: The decoder may shrink a picture as long as its shorter side keeps this many pixels; 0
            forbids it.
    """

    view: Callable[[Image.Image], Tensor]
    replay: Callable[[Image.Image, np.ndarray], Tensor] | None = None
    at_least: int = 0


# (samples, the text chosen for each, a random generator for each) -> named tensors with one entry per sample
ReadTexts = Callable[[Sequence[Sample], Sequence[str], Sequence[np.random.Generator]], dict[str, Tensor]]


@dataclasses.dataclass(frozen=True)
class RowInputs:
    """The inputs that a student reads from a row. They become the entries of its batches.

    Args:
        picture: Preprocessing of the row's picture for `batch["image"]`; None for a student without pictures.
        tokenize: Maps texts to token ids [n, length] for `batch["text"]`; on question rows for
            `batch["pair_text"]` [n, C, length].
        read_texts: Replaces `tokenize` when a row's text becomes several tensors (masked words, prompts).
        text_pairs: On question rows, add batch["text"], batch["attention_mask"] and batch["token_type_ids"],
            each [n, C, length]: the sub-words of each input under the run's tokenizer, int64, and two masks,
            bool.
        fields: Names of the cached teacher fields.
        trim: Maps a batch to one without the padding that none of its rows uses; by default fields keep their
            shape.
        mask_noise: Number of random numbers per picture, `batch["mask_noise"]` [n, mask_noise] in [0, 1).
    """

    picture: PictureView | None = None
    tokenize: Callable[[list[str]], Tensor] | None = None
    read_texts: ReadTexts | None = None
    text_pairs: bool = False
    fields: tuple[str, ...] = ()
    trim: Callable[[dict[str, Tensor]], dict[str, Tensor]] | None = None
    mask_noise: int = 0


class Student(Protocol):
    """A trainable model.

    `__call__`, `parameters`, `to`, `train` and `eval` are those of `torch.nn.Module`. The other members are
    the student's own.
    """

    @property
    def spec(self) -> StudentSpec:
        """The description from which this student is rebuilt."""

    @property
    def row_inputs(self) -> RowInputs:
        """The inputs that this student reads from a row."""

    def forward(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Compute the outputs that the recipe's heads and loss read.

        Returns:
            Tensors by name. A tensor without dimensions applies to all rows (a logit scale); every other
            output has one entry per row.
        """

    def capabilities(self) -> frozenset[Capability]:
        """Return what this student supports beyond training."""

    def limits(self) -> Mapping[Capability, str]:
        """Return reasons for missing capabilities, shown to the user. An empty mapping is allowed."""

    def saved_state(self) -> dict[str, Tensor]:
        """Return the tensors of model.safetensors; shared tensors occur once."""

    def load_saved_state(self, state: Mapping[str, Tensor]) -> None:
        """Load the tensors that `saved_state` returned."""

    def __call__(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Run `forward` with the module's hooks."""

    def parameters(self) -> Iterator[nn.Parameter]:
        """Return an iterator over the parameters. Each has at least one dimension, which DeepSpeed needs."""

    def to(self, device: str) -> Self:
        """Move parameters and buffers to a device."""

    def train(self, mode: bool = True) -> Self:
        """Switch to training mode, or to evaluation mode if `mode` is False."""

    def eval(self) -> Self:
        """Switch to evaluation mode."""


class Encodes(Protocol):
    """Members of a student with the capability ENCODES."""

    def encoder(self, name: str, pretrained: str, device: str) -> Encoder:
        """Return this student as the Encoder that `student eval` measures."""


class Generates(Protocol):
    """Members of a student with the capability GENERATES."""

    def generate_texts(
        self, fields: Mapping[str, Tensor], prompts: Sequence[str], *, num_beams: int, max_new_tokens: int
    ) -> list[str]:
        """Return the text that replaces the masks of each prompt.

        Args:
            fields: The teacher's fields for the picture of each prompt.
            prompts: Texts with mask tokens.
            num_beams: Width of the beam search.
            max_new_tokens: Longest output, in sub-words.
        """


class CheckpointsActivations(Protocol):
    """Members of a student with the capability CHECKPOINTS_ACTIVATIONS."""

    def checkpoint_activations(self) -> None:
        """Recompute inner activations in the backward pass to save memory."""


@dataclasses.dataclass(frozen=True)
class ExportRequest:
    """The arguments of one export.

    Args:
        form: "open_clip" or "hf".
        folder: An empty folder to write into; it is renamed once every file has been checked.
        name: The final name of the folder, for the code that loads it.
        run: The content of the run's run.json.
    """

    form: str
    folder: Path
    name: str
    run: Mapping[str, Any]


class Exported(NamedTuple):
    """A description of an exported folder, for its model card and its users."""

    library: str  # the library that loads the folder
    usage: str  # example code that loads the folder
    call: str  # one line that loads the folder; {} stands for its path
    notes: list[str]  # remarks for users of the folder, one line each
    pipeline: str = "zero-shot-image-classification"  # pipeline tag of the Hugging Face hub


@dataclasses.dataclass(frozen=True)
class Family:
    """A family of students: how to build one from a run and how to export one.

    Args:
        build: Maps the config of a StudentSpec and the run folder to a student with random weights.
        export: Writes a student of the family as the request describes, and returns a description of the
            folder. Raises UserError if the outputs of the written folder differ from the student's. None if
            no member of the family can be exported.
    """

    build: Callable[[Mapping[str, Any], Path], Student]
    export: Callable[[Any, ExportRequest], Exported] | None = None


def require(student: Student, capability: Capability, what: str) -> None:
    """Raise a UserError if the student lacks a capability.

    Args:
        student: The student of a run.
        capability: The capability that a command needs.
        what: The run or the option that the user named; the message starts with it.
    """
    if capability not in student.capabilities():
        raise UserError(f"{what}: this student cannot {capability}{reason_against(student, capability)}")


def reason_against(student: Student, capability: Capability) -> str:
    """Return ": REASON" for a missing capability, or "" if the student states no reason."""
    reason = student.limits().get(capability, "")
    return f": {reason}" if reason else ""
