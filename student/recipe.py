"""What a recipe and a run are: frozen records that one file per paper fills in. Imports no torch."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Generic, NamedTuple, TypeVar

from student.rows import Pairs, RowPlan
from teachercache.data.manifest import Manifest

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor, nn

    from student.contract import Student
    from teachercache.cache.store import Cache
    from teachercache.teachers.teacher import Teacher

DEMO_DATA = "data/demo"
Constants = TypeVar("Constants")
Shapes = Mapping[str, tuple[int, ...]]  # cached field -> its shape without row, text and view
Batch = Mapping[str, "Tensor"]  # everything that one step reads, by name; one entry per row
Outputs = dict[str, "Tensor"]  # what student, heads and gradient teacher computed of a batch
Terms = dict[str, "Tensor"]  # weighted terms of the loss, float32 scalars, named as in the paper
Notes = dict[str, "Tensor"]  # more numbers for the log, not minimized
Noise = Callable[["np.random.Generator"], "np.ndarray"]  # draws one row's random array


@dataclasses.dataclass(frozen=True)
class Optim:
    """AdamW and its learning-rate schedule: linear warm-up, then down to zero."""

    lr: float = 1e-3
    beta1: float = 0.9
    beta2: float = 0.98
    eps: float = 1e-6
    weight_decay: float = 0.1  # on matrices; never on biases, norms and scales
    warmup: float = 0.1  # share of the steps
    max_grad_norm: float = 0.0  # gradient clipping; 0 for none
    schedule: str = "cosine"  # or linear


class Progress(NamedTuple):
    """The step that is being computed and the number of steps, for schedules inside a loss."""

    step: int
    steps: int


@dataclasses.dataclass(frozen=True)
class Setting:
    """What a student is built for: the run's data and caches as far as they are known before training.

    Args:
        shapes: Shapes of the cached fields, by name.
        manifest: All rows of the data.
        rows: Places of the training rows in the manifest.
        task: On question rows, the task (`student.inputs.questions.Task`); else None.
        tokenizer: On question rows, the `tokenizers.Tokenizer` of the inputs; else None.
    """

    shapes: Shapes
    manifest: Manifest
    rows: "np.ndarray"
    task: Any = None
    tokenizer: Any = None


@dataclasses.dataclass(frozen=True)
class GradientTeacher:
    """A teacher that a gradient passes through: loaded in every run, never trained, sharded or saved.

    Args:
        load: Cache, constants, device -> teacher, or None where the constants need none.
        call: Teacher, outputs, loss fields, constants -> more outputs, differentiable in the outputs.
        memory: Teacher, rows at a time, constants -> a sentence about its memory, for --dry-run.
    """

    load: "Callable[[Cache, Any, str], Teacher | None]"
    call: "Callable[[Teacher, Outputs, Batch, Any], Outputs]"
    memory: "Callable[[Teacher, int, Any], str]"


def pairs_of_one_cache(constants: Any) -> RowPlan:
    """Return the default rows: pairs of a picture and a text, at most one cache."""
    return Pairs()


def no_fields(constants: Any) -> tuple[str, ...]:
    """Return no teacher field."""
    return ()


def no_heads(constants: Any, student: "Student", shapes: Shapes) -> None:
    """Return no distillation heads."""
    return None


def no_noise(constants: Any, shapes: Shapes) -> dict[str, Noise]:
    """Return no random arrays."""
    return {}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe(Generic[Constants]):
    """One paper: how a student is made, what it is shown, what is minimized.

    Core never reads `constants`: what it needs arrives through the functions below. Everything in the outputs and
    in the loss fields is gathered over ranks before the loss, which therefore sees the global batch; tensors
    without dimensions and names in `per_row` are not.

    Args:
        name: What `student train --recipe` takes.
        paper: Title and year.
        doc: One line for `student recipes`.
        constants: The paper's own frozen dataclass; each field is a `--set` of its name.
        student: Constants, setting -> the student, at random or from an `init` folder.
        loss: Outputs, loss fields, constants, progress -> weighted terms and notes.
        rows: Constants -> the kind of rows, `Pairs`, `Questions` or `Texts`, filled in.
        teacher_fields: Constants -> cached fields that are read.
        distill_heads: Constants, student, shapes -> a module trained with the student and never exported, or
            None. Its forward maps the outputs and loss fields of this rank's rows to more outputs.
        gradient_teacher: A teacher that the gradient passes through.
        sample_noise: Constants, shapes -> random arrays per row, by name, drawn anew in each epoch: the same on
            any number of ranks and in a resumed run.
        loss_fields: Batch entries passed to heads and loss; defaults to `teacher_fields`.
        per_row: Names (or fnmatch patterns) of outputs and loss fields whose terms are means over rows: they are
            not gathered, and the loss of each rank is averaged instead.
        data: Default of --data.
        teacher: The teacher that hints tell to build.
        optim: Optimizer settings.
        steps: Training steps.
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
    optim: Optim = Optim()
    steps: int = 500
    batch: int = 128

    @property
    def fields(self) -> tuple[str, ...]:
        """The teacher fields that are read, with the constants as they are."""
        return self.teacher_fields(self.constants)


@dataclasses.dataclass(frozen=True)
class Run:
    """Where and how one training happens; nothing in it is in the paper."""

    data: str
    cache: str  # "" where no teacher field is read; several teachers with commas between them
    out: str
    device: str = "auto"
    precision: str = "float32"  # or bfloat16: the student computes in it, weights and losses stay float32
    seed: int = 0
    zero: int = 0  # DeepSpeed's ZeRO stage
    workers: int = -1  # decoding processes; -1 for the spare cores
    online_teacher: bool = False  # --live: run the cache's teacher instead of reading its fields
    save_every: int = 500
    micro_batch: int = 0  # rows that a device computes at a time, 0 for all of a step's (`accumulate.py`)
    grad_checkpointing: bool = False  # recompute inner activations in backward instead of keeping them
    compile: bool = False  # torch.compile of the student
    eval_every: int = 0  # steps between evaluations, whose best student is kept in <out>/best; 0 for none
    eval_task: str = "retrieval"  # or zeroshot: chooses the best student
    report_to: str = ""  # tensorboard, wandb, or both with a comma, beside metrics.jsonl
