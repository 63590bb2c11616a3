"""Resolve the options of `student train` into a recipe and a run.

Applies defaults, `--set key=value`, and the device and number of workers of this machine.
"""

import ast
import dataclasses
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any, TypeVar, cast

from student.recipe import Optim, Recipe, Run
from teachercache.core.device import pick_device
from teachercache.core.errors import UserError, closest
from teachercache.core.process import default_workers
from teachercache.data.read import cache_folder

Record = TypeVar("Record", bound=Any)
# Settings of a run that have an option of `student train`
OPTIONS = ("data", "cache", "out", "seed", "online_teacher", "micro_batch", "eval_every", "report_to")


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
    report_to: str
    seed: int
    online_teacher: bool  # --live


def resolve_run(
    recipe: Recipe[Any], options: TrainOptions, settings: Iterable[str], *, resume: str
) -> tuple[Recipe[Any], Run]:
    """Return recipe and run with options and settings applied.

    Args:
        recipe: A recipe with its defaults.
        options: Options of `student train`.
        settings: Values of --set, each `key=value`.
        resume: "yes", "auto" or "", the value of --resume.

    Raises:
        UserError: An unknown setting, a value of a wrong type, or no run to resume.
    """
    recipe = dataclasses.replace(
        recipe, steps=options.steps or recipe.steps, batch=options.batch or recipe.batch
    )
    data = options.data or recipe.data
    run = Run(
        data=data,
        cache=options.cache or str(cache_folder(data)),
        out=options.out or run_folder(recipe.name, resume=resume),
        seed=options.seed,
        online_teacher=options.online_teacher,
        micro_batch=options.micro_batch or 0,
        eval_every=options.eval_every or 0,
        report_to=options.report_to,
    )
    return override(recipe, run, settings)


def on_this_machine(run: Run) -> Run:
    """Return the run with device and number of decoding processes chosen for this machine."""
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
    """Apply `key=value` settings, where the key is a constant's name, `optim.NAME` or `run.NAME`."""
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


def _replace(record: Record, name: str, text: str, key: str, recipe: Recipe[Any]) -> Record:
    """Return a dataclass with one field replaced by the value that the text stands for."""
    fields = {field.name: field.type for field in dataclasses.fields(record)}
    if name not in fields:
        raise UserError(f"--set {key}: {_choices(key, recipe)}")
    kind = cast(type, fields[name])
    try:
        value = _parse(text.strip(), kind)
    except (ValueError, SyntaxError) as error:
        raise UserError(f"--set {key}={text}: a value of type {kind.__name__} is expected") from error
    return dataclasses.replace(record, **{name: value})


def _parse(text: str, kind: type) -> Any:
    """Parse a Python literal, or true and false in any case; raise ValueError if its type is not `kind`."""
    if kind is str:
        return text
    value: Any = {"true": True, "false": False}.get(text.lower())
    value = ast.literal_eval(text) if value is None else value
    if kind is float and type(value) is int:
        value = float(value)
    if type(value) is not kind:
        raise ValueError(text)
    return value


def _choices(key: str, recipe: Recipe[Any]) -> str:
    """Return an error message that lists all settings."""
    names = [field.name for field in dataclasses.fields(recipe.constants)]
    names += [f"optim.{field.name}" for field in dataclasses.fields(Optim)]
    names += [f"run.{field.name}" for field in dataclasses.fields(Run) if field.name not in OPTIONS]
    return f"no such setting of {recipe.name}; {closest(key, names)}choose from {', '.join(names)}"


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
