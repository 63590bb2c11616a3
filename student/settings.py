"""Resolve the options of `student train` into a recipe and a run.

Applies defaults, `--set key=value`, and the device and number of workers of this machine.
"""

import dataclasses
import difflib
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeVar

from evaluation.tasks.registry import find as find_task
from evaluation.tasks.registry import selection_of
from student.recipe import Optim, Recipe, Run
from teachercache.core.device import pick_device
from teachercache.core.errors import UserError, closest
from teachercache.core.process import check_workers, default_workers
from teachercache.core.ranges import check, from_text, kinds_of
from teachercache.data.read import cache_folder

Record = TypeVar("Record", bound=Any)
# Settings of a run that have an option of `student train`
OPTIONS = {
    "data": "--data",
    "cache": "--cache",
    "out": "--out",
    "seed": "--seed",
    "online_teacher": "--live",
    "micro_batch": "--micro-batch",
    "eval_every": "--eval-every",
    "report_to": "--report-to",
}
# What other programs call a setting -> its name here
SYNONYMS = {
    "learning_rate": "optim.lr",
    "max_lr": "optim.lr",
    "betas": "optim.beta1",
    "adam_beta1": "optim.beta1",
    "adam_beta2": "optim.beta2",
    "adam_epsilon": "optim.eps",
    "wd": "optim.weight_decay",
    "decay": "optim.weight_decay",
    "warmup_steps": "optim.warmup",
    "warmup_ratio": "optim.warmup",
    "grad_clip": "optim.max_grad_norm",
    "clip_grad": "optim.max_grad_norm",
    "grad_clip_norm": "optim.max_grad_norm",
    "gradient_clipping": "optim.max_grad_norm",
    "scheduler": "optim.schedule",
    "lr_scheduler": "optim.schedule",
    "lr_schedule": "optim.schedule",
    "num_workers": "run.workers",
    "dtype": "run.precision",
    "amp": "run.precision",
    "bf16": "run.precision",
    "fp16": "run.precision",
    "mixed_precision": "run.precision",
    "gradient_checkpointing": "run.grad_checkpointing",
    "torch_compile": "run.compile",
    "torchcompile": "run.compile",
    "zero_stage": "run.zero",
    "save_steps": "run.save_every",
    "save_frequency": "run.save_every",
    "checkpoint_every": "run.save_every",
    "eval_steps": "--eval-every",
    "epochs": "--steps",
    "num_epochs": "--steps",
    "steps": "--steps",
    "max_steps": "--steps",
    "num_steps": "--steps",
    "iterations": "--steps",
    "batch": "--batch-size",
    "batch_size": "--batch-size",
    "global_batch_size": "--batch-size",
    "gradient_accumulation_steps": "--micro-batch",
    "accum_freq": "--micro-batch",
    "output_dir": "--out",
    "live": "--live",
    "resume": "--resume",
    "dry_run": "--dry-run",
    "wandb": "--report-to",
    "tensorboard": "--report-to",
    "arch": "model",
    "architecture": "model",
    "model_name": "model",
    "pretrained": "init",
}


@dataclasses.dataclass(frozen=True)
class TrainOptions:
    """Options of `student train`; None stands for the default."""

    data: str | None
    cache: str | None
    out: str | None
    steps: int | None
    batch: int | None  # --batch-size
    micro_batch: int | None
    eval_every: int | None
    report_to: str | None
    seed: int | None
    online_teacher: bool | None  # --live


def resolve_run(
    recipe: Recipe[Any],
    options: TrainOptions,
    settings: Iterable[str],
    *,
    resume: str,
    saved: Mapping[str, Any] = MappingProxyType({}),
) -> tuple[Recipe[Any], Run]:
    """Return recipe and run with options and settings applied.

    Args:
        recipe: A recipe with its defaults.
        options: Options of `student train`.
        settings: Values of --set, each `key=value`.
        resume: "yes", "auto" or "", the value of --resume.
        saved: Settings of a run that stand where no option was given (`--config`).

    Raises:
        UserError: An unknown setting, a value of a wrong type or out of its range, or no run to resume.
    """
    given = {name: value for name, value in dataclasses.asdict(options).items() if value is not None}
    sizes = {name: given.pop(name) for name in ("steps", "batch") if name in given}
    recipe = dataclasses.replace(recipe, **sizes)
    values = {"data": recipe.data, **saved, **given}
    if "cache" not in given and ("data" in given or "cache" not in saved):
        values["cache"] = str(cache_folder(values["data"]))
    if "out" not in values:
        values["out"] = run_folder(recipe.name, resume=resume)
    run = Run(**values)
    kinds = kinds_of(Run)
    for name, option in OPTIONS.items():
        try:
            check(getattr(run, name), kinds[name])
        except ValueError as error:
            raise UserError(f"{option} {getattr(run, name)}: {error}") from error
    recipe, run = override(recipe, run, settings)
    selection_of(find_task(run.eval_task))
    return recipe, run


def on_this_machine(run: Run) -> Run:
    """Return the run with device and number of decoding processes chosen for this machine."""
    if run.workers > 0:
        check_workers(run.workers, "--set run.workers=")
    workers = run.workers if run.workers >= 0 else default_workers()
    return dataclasses.replace(run, device=pick_device(run.device), workers=workers)


def as_json(recipe: Recipe[Any], run: Run) -> dict[str, Any]:
    """Return the settings of a recipe and a run as plain Python values, for printing as JSON."""
    values: dict[str, Any] = {
        "name": recipe.name,
        "paper": recipe.paper,
        "doc": recipe.doc,
        "data": recipe.data,
        "teacher": recipe.teacher,
        "steps": recipe.steps,
        "batch": recipe.batch,
        "loss_fields": recipe.loss_fields,
    }
    values |= {"constants": dataclasses.asdict(recipe.constants), "optim": dataclasses.asdict(recipe.optim)}
    values |= {"teacher_fields": recipe.fields, "per_row": sorted(recipe.per_row)}
    return {"recipe": values, "run": dataclasses.asdict(run)}


def override(recipe: Recipe[Any], run: Run, settings: Iterable[str]) -> tuple[Recipe[Any], Run]:
    """Apply `key=value` settings, where the key is a constant's name, `optim.NAME` or `run.NAME`.

    Raises:
        UserError: An unknown setting, or a value of a wrong type or out of its range.
    """
    records = {"": recipe.constants, "optim": recipe.optim, "run": run}
    chosen: dict[str, dict[str, Any]] = {group: {} for group in records}
    for setting in settings:
        key, equals, text = setting.partition("=")
        group, dot, name = key.strip().rpartition(".")
        if not equals:
            raise UserError(f"--set {setting}: write KEY=VALUE")
        kinds = kinds_of(type(records[group])) if group in records and bool(dot) == bool(group) else {}
        if name not in kinds:
            raise UserError(f"--set {key}: {_choices(key.strip(), recipe)}")
        try:
            chosen[group][name] = from_text(text.strip(), kinds[name])
        except ValueError as error:
            raise UserError(f"--set {key}={text}: {error}") from error
    return (
        dataclasses.replace(
            recipe,
            constants=_replace(recipe.constants, chosen[""]),
            optim=_replace(recipe.optim, chosen["optim"]),
        ),
        _replace(run, chosen["run"]),
    )


def _replace(record: Record, values: Mapping[str, Any]) -> Record:
    return dataclasses.replace(record, **values) if values else record


def _choices(key: str, recipe: Recipe[Any]) -> str:
    """Return an error message that lists all settings."""
    names = [field.name for field in dataclasses.fields(recipe.constants)]
    names += [f"optim.{field.name}" for field in dataclasses.fields(Optim)]
    names += [f"run.{field.name}" for field in dataclasses.fields(Run) if field.name not in OPTIONS]
    last = key.rpartition(".")[2].lower().replace("-", "_")
    short = {name.rpartition(".")[2]: name for name in reversed(names)} | {
        word: name for word, name in SYNONYMS.items() if name in names or name.startswith("--")
    }
    near = [last] if last in short else []
    if not near and not closest(key, names):
        near = difflib.get_close_matches(last, short, n=1, cutoff=0.75)
    hint = f"did you mean '{short[near[0]]}'? " if near else closest(key, names)
    return f"no such setting of {recipe.name}; {hint}choose from {', '.join(names)}"


def run_folder(recipe: str, *, resume: str) -> str:
    """Return the folder of a run without --out.

    Args:
        recipe: Name of the recipe.
        resume: "yes" for the recipe's newest run, "auto" for the newest one or a new name, "" for a new name, which has
            the time.
    """
    runs = sorted(Path("runs").glob(f"{recipe}-*/run.json"), key=lambda path: path.stat().st_mtime)
    if resume and runs:
        return str(runs[-1].parent)
    if resume == "yes":
        raise UserError(f"no run of {recipe} in runs/: pass --out RUN, or drop --resume")
    return str(Path("runs", f"{recipe}-{time.strftime('%Y%m%d-%H%M%S')}"))
