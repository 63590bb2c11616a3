"""What a recipe and a run are, and how `--set key=value` changes one. Frozen records; no torch."""

import ast
import dataclasses
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

from teachercache.core.errors import UserError, closest

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


# Settings of a run that `student train` has options of their own for
OPTIONS = ("data", "cache", "out", "seed", "live", "micro_batch", "eval_every", "report_to")


def override(recipe: Recipe, run: Run, settings: Iterable[str]) -> tuple[Recipe, Run]:
    """Apply `key=value` settings: a constant by its name, `optim.NAME`, or `run.NAME`."""
    for setting in settings:
        key, equals, text = setting.partition("=")
        if not equals:
            raise UserError(f"--set {setting}: write KEY=VALUE")
        group, dot, name = key.strip().rpartition(".")
        if group == "optim":
            recipe = dataclasses.replace(recipe, optim=_replace(recipe.optim, name, text, key, recipe))
        elif group == "run":
            run = _replace(run, name, text, key, recipe)
        elif not dot:
            recipe = dataclasses.replace(recipe, constants=_replace(recipe.constants, key, text, key, recipe))
        else:
            raise UserError(f"--set {key}: {_choices(key, recipe)}")
    return recipe, run


def _replace(record: Any, name: str, text: str, key: str, recipe: Recipe) -> Any:
    fields = {field.name: field.type for field in dataclasses.fields(record)}
    if name not in fields:
        raise UserError(f"--set {key}: {_choices(key, recipe)}")
    try:
        value = _parse(text.strip(), fields[name])
    except (ValueError, SyntaxError) as error:
        raise UserError(f"--set {key}={text}: a value of type {fields[name].__name__} is expected") from error
    return dataclasses.replace(record, **{name: value})


def _parse(text: str, kind: type) -> Any:
    if kind is str:
        return text
    value = {"true": True, "false": False}.get(text.lower())
    value = ast.literal_eval(text) if value is None else value
    if kind is float and type(value) is int:
        value = float(value)
    if type(value) is not kind:
        raise ValueError(text)
    return value


def _choices(key: str, recipe: Recipe) -> str:
    names = [field.name for field in dataclasses.fields(recipe.constants)]
    names += [f"optim.{field.name}" for field in dataclasses.fields(Optim)]
    names += [f"run.{field.name}" for field in dataclasses.fields(Run) if field.name not in OPTIONS]
    return f"no such setting of {recipe.name}; {closest(key, names)}choose from {', '.join(names)}"


def run_folder(recipe: str, *, resume: bool) -> str:
    """The newest run of the recipe to resume, or a new folder named by the time."""
    if not resume:
        return str(Path("runs", f"{recipe}-{time.strftime('%Y%m%d-%H%M%S')}"))
    runs = sorted(Path("runs").glob(f"{recipe}-*/run.json"), key=lambda path: path.stat().st_mtime)
    if not runs:
        raise UserError(f"no run of {recipe} in runs/: pass --out RUN, or leave --resume away")
    return str(runs[-1].parent)
