"""What a recipe and a run are, and how `--set key=value` changes one. Frozen records; no torch."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

DEMO_DATA = "data/demo"


@dataclasses.dataclass(frozen=True)
class Optim:
    """AdamW and its schedule: linear warm-up, then down to zero."""

    lr: float = 1e-3
    beta1: float = 0.9
    beta2: float = 0.98
    eps: float = 1e-6
    weight_decay: float = 0.1  # on matrices; never on biases, norms and scales
    warmup: float = 0.1  # share of the steps
    clip: float = 0.0  # largest gradient norm, 0 for none
    decay: str = "cosine"  # or linear


class Now(NamedTuple):
    """Where training is, for schedules inside a loss."""

    step: int
    steps: int


@dataclasses.dataclass(frozen=True)
class Live:
    """A teacher that a gradient passes through: loaded in every run, never trained, sharded or saved."""

    load: Callable[
        [Any, Any, str], Any
    ]  # cache, constants, device -> teacher, or None where the constants need none
    call: Callable[[Any, dict, dict, Any], dict]  # teacher, outputs, fields, constants -> more outputs
    memory: Callable[
        [Any, int, Any], str
    ]  # teacher, rows, constants -> what it needs, in words, for --dry-run


@dataclasses.dataclass(frozen=True)
class Recipe:
    """One paper's training. See README, "A recipe in one page"."""

    name: str
    paper: str
    doc: str
    constants: Any  # the paper's own frozen dataclass; `model` and `init` are in it
    build: Callable[
        ..., Any
    ]  # constants -> student; of questions: constants, task, tokenizer, shapes -> student
    heads: Callable[[Any, Any, dict], Any] | None  # constants, student, shapes of fields -> module, or None
    loss: Callable[
        [dict, dict, Any, Now], tuple[dict, dict]
    ]  # outputs, batch, constants, now -> terms, notes
    reads: (
        tuple[str, ...] | Callable[[Any], tuple[str, ...]]
    ) = ()  # teacher fields, or constants -> teacher fields
    given: tuple[str, ...] = ()  # what of a batch the loss sees, where that is not what is read
    questions: bool = False  # rows are a task's questions (`tasks.py`), not pairs of a picture and a text
    data: str = DEMO_DATA  # what `--data` is where nobody says
    teacher: str = "clip-lite"  # what a hint says to build where there is no cache
    live: Live | None = None  # a teacher that the gradient passes through
    draw: Callable[[Any, Any, dict], dict] | None = (
        None  # a row's generator, constants, shapes -> random arrays
    )
    across: tuple[str, ...] = ()  # outputs and fields, or patterns, that the loss sees of the whole batch
    optim: Optim = Optim()
    steps: int = 500
    batch: int = 128

    @property
    def fields(self) -> tuple[str, ...]:
        """Teacher fields in the batch, with the constants as they are."""
        return self.reads(self.constants) if callable(self.reads) else self.reads


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
    live: bool = False
    save_every: int = 500
    micro_batch: int = 0  # rows that a device computes at a time, 0 for all of a step's (`accumulate.py`)
    grad_checkpointing: bool = False  # compute inner activations again in backward instead of keeping them
    compile: bool = False  # torch.compile of the student
    eval_every: int = 0  # steps between evaluations, whose best student is kept in <out>/best; 0 for none
    eval_task: str = "retrieval"  # or zeroshot: what the best is chosen by
    report_to: str = ""  # tensorboard, wandb, or both with a comma, beside metrics.jsonl
