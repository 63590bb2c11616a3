"""Definitions of a recipe and a run: frozen records, filled in by one file per paper and by the command line.

Imports no torch.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Annotated, Any, Generic, Literal, NamedTuple, TypeVar

from annotated_types import Interval

from student.rows import Pairs, RowPlan
from teachercache.core.ranges import Count, Form, Name, Number, Seed, Share, Weight
from teachercache.data.manifest import Manifest

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor, nn

    from student.contract import Student
    from teachercache.cache.store import Cache
    from teachercache.teachers.teacher import Teacher

DEMO_DATA = "data/demo"
Constants = TypeVar("Constants")
Shapes = Mapping[str, tuple[int, ...]]  # name of a cached field -> its shape without row, text and view
Batch = Mapping[str, "Tensor"]  # the inputs of one step by name, one entry per row
Outputs = dict[str, "Tensor"]  # outputs of student, heads and gradient teacher by name
Terms = dict[str, "Tensor"]  # weighted terms of the loss, float32 scalars, named as in the paper
Notes = dict[str, "Tensor"]  # further numbers for the log, not minimized
Noise = Callable[["np.random.Generator"], "np.ndarray"]  # draws the random array of one row


Beta = Annotated[float, Interval(ge=0, lt=1)]
Sinks = Annotated[  # one or both
    str,
    Form(
        "|tensorboard( *, *wandb)?|wandb( *, *tensorboard)?",
        "choose from tensorboard, wandb; metrics.jsonl is always written",
    ),
]
Device = Annotated[str, Form(r"[a-z]+(:\d+)?", "not a device; try auto, cpu, cuda or cuda:0")]


@dataclasses.dataclass(frozen=True)
class Optim:
    """Settings of AdamW and its learning-rate schedule: linear warm-up, then decay to zero."""

    lr: Weight = 1e-3
    beta1: Beta = 0.9
    beta2: Beta = 0.98
    eps: Weight = 1e-6
    weight_decay: Weight = 0.1  # for matrices only; biases, norms and scales are not decayed
    warmup: Share = 0.1  # fraction of the steps
    max_grad_norm: Weight = 0.0  # gradient clipping; 0 turns it off
    schedule: Literal["cosine", "linear"] = "cosine"


class Progress(NamedTuple):
    """The index of the current step and the total number of steps, for schedules inside a loss."""

    step: int
    steps: int


@dataclasses.dataclass(frozen=True)
class Setting:
    """The data and caches that a student is built for.

    Args:
        shapes: Shapes of the cached fields by name.
        manifest: All rows of the data.
        rows: Indices of the training rows in the manifest.
        task: On question rows, the task (`student.inputs.questions.Task`); otherwise None.
        tokenizer: On question rows, the `tokenizers.Tokenizer` of the inputs; otherwise None.
    """

    shapes: Shapes
    manifest: Manifest
    rows: "np.ndarray"
    task: Any = None
    tokenizer: Any = None


@dataclasses.dataclass(frozen=True)
class GradientTeacher:
    """A frozen teacher that needs backpropagation. Every run loads it; it is never trained, sharded or saved.

    Args:
        load: Maps cache, constants and device to the teacher, or to None if the constants need none.
        call: Maps teacher, outputs, loss fields and constants to further outputs, differentiable with respect
            to the outputs.
        memory: Maps teacher, rows per forward pass and constants to a sentence about memory use, for
            --dry-run.
    """

    load: "Callable[[Cache, Any, str], Teacher | None]"
    call: "Callable[[Teacher, Outputs, Batch, Any], Outputs]"
    memory: "Callable[[Teacher, int, Any], str]"


def pairs_of_one_cache(constants: Any) -> RowPlan:
    """Return the default kind of rows: (picture, text) pairs with at most one cache."""
    return Pairs()


def no_fields(constants: Any) -> tuple[str, ...]:
    """Return an empty tuple: the recipe reads no teacher field."""
    return ()


def no_heads(constants: Any, student: "Student", shapes: Shapes) -> None:
    """Return None: the recipe has no distillation heads."""
    return None


def no_noise(constants: Any, shapes: Shapes) -> dict[str, Noise]:
    """Return an empty dict: the recipe draws no random arrays."""
    return {}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe(Generic[Constants]):
    """One paper: how its student is built, which rows it trains on and which loss it minimizes.

    Core never reads `constants`; the functions below return everything that core needs. Outputs and loss
    fields are gathered over ranks before the loss is computed, so that the loss covers the global batch.
    Tensors without dimensions and names in `per_row` are not gathered.

    Args:
        name: The value of `student train --recipe`.
        paper: Title and year.
        doc: One line for `student recipes`.
        constants: A frozen dataclass of the paper's settings; `--set NAME=VALUE` changes its fields. The types of
            the fields may declare ranges and choices (`teachercache.core.ranges`), which --set checks.
        student: Maps constants and a Setting to the student, with random weights or those of an `init`
            folder.
        loss: Maps outputs, loss fields, constants and progress to weighted terms and notes.
        rows: Maps constants to the kind of rows: `Pairs`, `Questions` or `Texts`, filled in.
        teacher_fields: Maps constants to the names of the cached fields that are read.
        distill_heads: Maps constants, student and shapes to a module that is trained with the student and
            never exported, or to None. Its forward maps the outputs and loss fields of this rank's rows to
            further outputs.
        gradient_teacher: A frozen teacher that needs backpropagation.
        sample_noise: Maps constants and shapes to functions that draw a random array per row, by name. They
            are drawn anew in each epoch and do not depend on the number of ranks or on a resume.
        loss_fields: Batch entries passed to heads and loss; defaults to `teacher_fields`.
        per_row: Names (or fnmatch patterns) of outputs and loss fields whose terms are means over rows. They
            are not gathered; the losses of the ranks are averaged instead.
        data: Default of --data.
        teacher: The teacher that hints suggest to build a cache with.
        teacher_outputs: Outputs that hints spell with an argument, such as {"hidden": "hidden:3"}.
        optim: Settings of the optimizer.
        steps: Number of training steps.
        batch: Rows per step, over all ranks.
    """

    name: str
    paper: str
    doc: str
    constants: Constants
    student: "Callable[[Constants, Setting], Student]"
    loss: "Callable[[Outputs, Batch, Constants, Progress], tuple[Terms, Notes]]"
    rows: Callable[[Constants], RowPlan] = pairs_of_one_cache
    teacher_fields: Callable[[Constants], tuple[str, ...]] = no_fields
    distill_heads: "Callable[[Constants, Student, Shapes], nn.Module | None]" = no_heads
    gradient_teacher: GradientTeacher | None = None
    sample_noise: Callable[[Constants, Shapes], dict[str, Noise]] = no_noise
    loss_fields: tuple[str, ...] = ()
    per_row: frozenset[str] = frozenset()
    data: str = DEMO_DATA
    teacher: str = "clip-lite"
    teacher_outputs: Mapping[str, str] = dataclasses.field(default_factory=dict)
    optim: Optim = Optim()
    steps: int = 500
    batch: int = 128

    @property
    def fields(self) -> tuple[str, ...]:
        """The teacher fields that are read under the current constants."""
        return self.teacher_fields(self.constants)


@dataclasses.dataclass(frozen=True)
class Run:
    """Settings of one training run that are not part of the paper: data, output folder, device, seed."""

    data: Name
    cache: Name  # a cache or a folder of caches; several are separated by commas
    out: Name
    device: Device = "auto"
    # bfloat16 is autocast for student and heads; weights and losses stay float32
    precision: Literal["float32", "bfloat16"] = "float32"
    seed: Seed = 0
    zero: Annotated[int, Interval(ge=0, le=3)] = 0  # ZeRO stage of DeepSpeed
    workers: Annotated[
        int, Interval(ge=-1, le=256)
    ] = -1  # number of decoding processes; -1 for the free cores
    online_teacher: bool = False  # --live: run the cache's teacher instead of reading its fields
    save_every: Number = 500
    # Rows per forward pass of a device; 0 for all rows of a step (`student.training.accumulate`)
    micro_batch: Count = 0
    grad_checkpointing: bool = False  # recompute inner activations in the backward pass
    compile: bool = False  # compile the student with torch.compile
    eval_every: Count = 0  # steps between evaluations; <out>/best keeps the best student; 0 for none
    eval_task: Name = "retrieval"  # or zeroshot; its score selects the best student
    report_to: Sinks = ""  # tensorboard, wandb, or both with a comma; metrics.jsonl is always written
