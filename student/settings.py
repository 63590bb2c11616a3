"""Change a recipe or a run with `--set key=value`."""

import ast
import dataclasses
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from student.recipe import Optim, Recipe, Run
from teachercache.core.errors import UserError, closest

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
