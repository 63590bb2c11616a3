"""Read the facts of a run for comparisons: its settings, its log, its speed and its measurements."""

import dataclasses
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from student.models.run_file import WEIGHTS, read_run, record_file, remedy_of
from student.settings import OPTIONS
from student.training.telemetry.curve import smooth
from student.training.telemetry.metrics import read_metrics, terms_of
from teachercache.core.digests import damage_of
from teachercache.core.errors import UserError
from teachercache.core.progress import say

Line = Mapping[str, Any]
# Settings that name the run, not what it does
NAMES_OF_A_RUN = ("out",)
# Measurements: (data set, task) -> metric -> value
Measured = dict[tuple[str, str], dict[str, float]]


@dataclasses.dataclass(frozen=True)
class Logged:
    """A value of the log, as a running mean over a fiftieth of the steps: the last one, and the lowest with its step."""

    last: float
    best: float
    best_step: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunFacts:
    """What a run folder tells about a run.

    Args:
        folder: The folder.
        recipe: The recipe's name.
        student: Family of the student.
        parameters: Number of the student's parameters; None before the run has ended.
        teachers: Names of the teachers of its caches.
        settings: Every setting by the name under which it is typed, and what the run was made of.
        steps: Number of steps in the log.
        planned: Number of steps of a complete run.
        speed: The content of speed.json; empty without one.
        lines: metrics.jsonl.
        terms: Names of the loss terms in the log.
        evals: evals.jsonl.
        measured: The results in eval/.
    """

    folder: Path
    recipe: str
    student: str
    parameters: int | None
    teachers: tuple[str, ...]
    settings: Mapping[str, Any]
    steps: int
    planned: int
    speed: Mapping[str, float]
    lines: list[dict[str, Any]]
    terms: tuple[str, ...]
    evals: list[dict[str, Any]]
    measured: Measured

    @property
    def finished(self) -> bool:
        """Whether the run has a student of all its steps."""
        return self.parameters is not None

    def logged(self, name: str) -> Logged | None:
        """Return a value of the log; None if no line has it."""
        lines = [line for line in self.lines if name in line and math.isfinite(line[name])]
        if not lines:
            return None
        values = smooth([float(line[name]) for line in lines])
        best = min(range(len(values)), key=values.__getitem__)
        return Logged(values[-1], values[best], lines[best]["step"] + 1)


def read_facts(folder: Path) -> RunFacts:
    """Return the facts of a run. Damaged logs and results are skipped with a message.

    Raises:
        UserError: The folder is no run of `student train`, or its run.json is damaged.
    """
    if record_file(folder).name != "run.json" or (folder / "open_clip_config.json").exists():
        raise UserError(f"{folder} is an export, which has no log: pass the run that it was exported from")
    record = read_run(folder, alone=True)
    try:
        recipe = record["recipe"]
        settings = _settings(record)
        planned = int(recipe["steps"])
        teachers = tuple(str(teacher["name"]) for teacher in record["teachers"])
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{folder / 'run.json'} is damaged: {remedy_of(folder)}") from error
    lines = read_metrics(folder / "metrics.jsonl")
    return RunFacts(
        folder=folder,
        recipe=str(recipe["name"]),
        student=str(record["student"]["family"]),
        parameters=_parameters(folder),
        teachers=teachers,
        settings=settings,
        steps=max((line["step"] + 1 for line in lines), default=0),
        planned=planned,
        speed=_numbers(_read_json(folder, "speed.json")),
        lines=lines,
        terms=terms_of(lines),
        evals=[line for line in read_metrics(folder / "evals.jsonl") if "score" in line],
        measured=_measured(folder),
    )


def _settings(record: Mapping[str, Any]) -> dict[str, Any]:
    """Return all settings of a run.json by the name under which a user types them."""
    recipe, run = record["recipe"], record["run"]
    settings = {"--recipe": recipe["name"], "--steps": recipe["steps"], "--batch-size": recipe["batch"]}
    settings |= {OPTIONS.get(name, f"run.{name}"): run[name] for name in run if name not in NAMES_OF_A_RUN}
    settings |= dict(recipe["constants"])
    settings |= {f"optim.{name}": value for name, value in recipe["optim"].items()}
    settings |= {
        "processes": record.get("world_size"),
        "training rows": record.get("num_rows"),
        "digest of the rows": record.get("rows"),
        "fingerprint of the caches": record.get("cache"),
        "views": record.get("views"),
    }
    return settings | {f"version of {name}": value for name, value in record.get("versions", {}).items()}


def _parameters(folder: Path) -> int | None:
    """Return the number of values in a run's weights; None if the file is missing or damaged."""
    path = folder / WEIGHTS
    if not path.exists():
        return None
    try:
        with safe_open(path, "pt") as file:
            return sum(math.prod(file.get_slice(name).get_shape()) for name in sorted(file.keys()))
    except (SafetensorError, OSError):
        say(f"WARNING: {path} cannot be read: {remedy_of(folder)}")
        return None


def _read_json(folder: Path, name: str) -> dict[str, Any]:
    """Return a JSON file of a run, or an empty dict, with a message if it is damaged."""
    path = folder / name
    if not path.exists():
        return {}
    try:
        content = json.loads(path.read_bytes())
        if isinstance(content, dict) and not damage_of(folder, name):
            return content
    except (ValueError, RecursionError, UserError):
        pass
    say(f"WARNING: {path} is damaged and left out: measure the run again")
    return {}


def _measured(folder: Path) -> Measured:
    """Return the results that `student eval` kept in a run."""
    measured: Measured = {}
    for path in sorted((folder / "eval").glob("*.json")):
        result = _read_json(folder, path.relative_to(folder).as_posix())
        data, measure, metrics = result.get("dataset"), result.get("task"), result.get("metrics")
        if isinstance(data, str) and isinstance(measure, str) and isinstance(metrics, dict):
            measured[data, measure] = _numbers(metrics)
        elif result:
            say(f"WARNING: {path} is no result of `student eval` and is left out")
    return measured


def _numbers(values: Mapping[str, Any]) -> dict[str, float]:
    """Return the finite numbers among the values of a JSON object."""
    return {
        name: value for name, value in values.items() if type(value) in (int, float) and math.isfinite(value)
    }
