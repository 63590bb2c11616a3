"""The Python interface of phase 2: what `student train`, `student eval` and `student export` do, as functions.

They take the settings of the commands, raise UserError, return records and print nothing on stdout. Progress and notices
go to stderr.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypedDict, Unpack

from annotated_types import Interval

from evaluation.tasks.registry import TASKS
from evaluation.tasks.registry import find as find_task
from evaluation.tasks.task import Kind
from student.recipe import DEMO_DATA, Recipe, Run
from teachercache.core.errors import UserError
from teachercache.core.progress import status
from teachercache.core.ranges import MOST, Number, Seed, check_options

if TYPE_CHECKING:
    from evaluation.results.run import Result
    from evaluation.results.suite import Report

MATCHERS = ", ".join(task.name for task in TASKS.values() if task.kind is Kind.MATCHER)
SAMPLES_ERROR = f"--samples is a number of noise draws: only {MATCHERS} take one"
Settings = Mapping[str, object] | Sequence[str]  # {"fd": 1000, "optim.lr": 1e-3}, or texts "fd=1000"


class TrainKeywords(TypedDict, total=False):
    """Further options of `train`, with the names of the options of `student train`.

    Attributes:
        steps: Number of training steps.
        batch_size: Rows per step, over all processes.
        micro_batch: Rows per forward pass of a device.
        eval_every: Steps between evaluations.
        report_to: tensorboard, wandb, or both with a comma.
        seed: Seed of all random numbers.
        live: Run the cache's teacher instead of reading its cached outputs.
        resume: Resume from the last checkpoint; "auto": if there is one.
        dry_run: Take two steps, print time and memory, and write nothing.
    """

    steps: Number | None
    batch_size: Annotated[int, Interval(ge=2, le=MOST)] | None
    micro_batch: Annotated[int, Interval(ge=2, le=MOST)] | None
    eval_every: Number | None
    report_to: str | None
    seed: Seed | None
    live: bool
    resume: Literal[True, False, "auto"]
    dry_run: bool


@dataclasses.dataclass(frozen=True)
class Trained:
    """A finished training.

    Attributes:
        run: The run folder, which `evaluate`, `export` and `build` take.
        recipe: The name of the recipe.
        steps: The number of steps that the run has taken.
        metrics: The last line of metrics.jsonl: `loss`, its terms and `lr`; empty for a dry run.
        scores: The last line of evals.jsonl, empty without `eval_every`.
        next_command: The command to type next.
    """

    run: Path
    recipe: str
    steps: int
    metrics: Mapping[str, float]
    scores: Mapping[str, float]
    next_command: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Export:
    """An exported student.

    Attributes:
        folder: The folder that was written.
        format: open_clip or hf.
        load: One line of Python that loads the folder.
        notes: Remarks for users of the folder.
    """

    folder: Path
    format: str
    load: str
    notes: tuple[str, ...]


def resolve(
    recipe: str | None = None,
    data: str | Path | None = None,
    *,
    config: str | Path | None = None,
    cache: str | Path | None = None,
    out: str | Path | None = None,
    settings: Settings = (),
    **options: Unpack[TrainKeywords],
) -> tuple[Recipe[Any], Run]:
    """Return the recipe and the run that `train` would train with the same arguments."""
    from student.recipes.registry import find
    from student.settings import TrainOptions, resolve_run

    check_options(options, TrainKeywords)
    resume = {True: "yes", "auto": "auto"}.get(options.get("resume", False), "")
    chosen = TrainOptions(
        data=_text(data),
        cache=_text(cache),
        out=_text(out),
        steps=options.get("steps"),
        batch=options.get("batch_size"),
        micro_batch=options.get("micro_batch"),
        eval_every=options.get("eval_every"),
        report_to=options.get("report_to"),
        seed=options.get("seed"),
        online_teacher=options.get("live") or None,
    )
    if config is None:
        if recipe is None:
            raise UserError("pass --recipe NAME (`student recipes` lists them), or --config RUN.json")
        return resolve_run(find(recipe), chosen, _settings(settings), resume=resume)
    from student.run_config import read_config

    read = read_config(config, recipe)
    saved = read.run | ({"out": str(read.folder)} if resume else {})
    return resolve_run(read.recipe, chosen, _settings(settings), resume=resume, saved=saved)


def train(
    recipe: str | None = None,
    data: str | Path | None = None,
    *,
    config: str | Path | None = None,
    cache: str | Path | None = None,
    out: str | Path | None = None,
    settings: Settings = (),
    **options: Unpack[TrainKeywords],
) -> Trained:
    """Train a student with a recipe.

    Args:
        recipe: A name of `student recipes`, or package.module:RECIPE.
        data: The training data, as in `build`; default: the recipe's.
        config: The run.json of a run, whose recipe and settings are taken; the other arguments come on top.
        cache: A cache or a folder of caches; default: `caches/<data>`.
        out: The run folder; default: `runs/<recipe>-<time>`.
        settings: Constants of the recipe, `optim.NAME` and `run.NAME`: {"fd": 1000, "optim.lr": 1e-3}.
        **options: See `TrainKeywords`.

    Raises:
        UserError: The run cannot be trained; the message says what to change.
        KeyboardInterrupt: A signal stopped the run, after a checkpoint.
    """
    chosen, run = resolve(recipe, data, config=config, cache=cache, out=out, settings=settings, **options)

    with status("importing libraries"):
        from student.inference.measure import score_while_training
        from student.training import loop
    from student.settings import on_this_machine
    from student.training.telemetry.metrics import read_metrics

    run = on_this_machine(run)
    resume, dry_run = options.get("resume", False), options.get("dry_run", False)
    resuming = resume is True or (resume == "auto" and Path(run.out).exists())
    trained = loop.train(
        chosen,
        run,
        resume=resuming,
        dry_run=dry_run,
        evaluate=score_while_training(chosen, run) if run.eval_every else None,
        new_name=out is None and not resuming,
    )
    logs = ("metrics.jsonl", "evals.jsonl")
    lines = [[] if dry_run else read_metrics(trained.folder / name) for name in logs]
    metrics, scores = (dict(log[-1]) if log else {} for log in lines)
    steps = metrics.get("step", -1) + 1
    return Trained(
        trained.folder, chosen.name, steps, metrics, scores, loop.next_command(trained, chosen, run)
    )


def evaluate(
    models: str | Path | Sequence[str | Path],
    task: str,
    data: str | Path = DEMO_DATA,
    *,
    samples: int | None = None,
    figures: str | Path | None = None,
    out: str | Path | None = None,
) -> "list[Result]":
    """Measure models on a task.

    Args:
        models: A run, an exported folder, a teacher's name, or several of them.
        task: A task of `student eval`, or `all`: every data set below `data`.
        data: The evaluation data.
        samples: Noise draws per match of a diffusion model.
        figures: A folder, to draw predictions for some rows.
        out: The folder of the tables of task `all`; default: `evals/<data>`.

    Returns:
        A result for each model and each way in which it answers, with the metrics by name.

    Raises:
        UserError: A model cannot be measured on the task; the message says what to change.
    """
    check_options({"samples": samples}, samples=Number | None)
    if task == "all":
        return evaluate_all(models, data, samples=samples, figures=figures, out=out).results
    with status("importing libraries"):
        from student.inference.measure import measure_models

    if out is not None:
        raise UserError(
            "--out is where --task all writes its tables; the results of a run are kept in RUN/eval"
        )
    chosen = find_task(task)
    if samples and chosen.kind is not Kind.MATCHER:
        raise UserError(SAMPLES_ERROR)
    if figures and chosen.kind is not Kind.ENCODER:
        raise UserError(f"--figures draws what encoders predict: leave it out for {chosen.name}")
    folder = Path(figures) if figures else None
    return measure_models(_texts(models), chosen, str(data), samples=samples, figures=folder)


def evaluate_all(
    models: str | Path | Sequence[str | Path],
    data: str | Path,
    *,
    samples: int | None = None,
    figures: str | Path | None = None,
    out: str | Path | None = None,
) -> "Report":
    """Measure models on every data set below a folder; return the results and the data sets that were skipped."""
    with status("importing libraries"):
        from student.inference.measure import measure_suite

    if samples:
        raise UserError(SAMPLES_ERROR)
    folder = Path(out) if out else Path("evals", Path(data).name or "data")
    return measure_suite(_texts(models), str(data), folder, Path(figures) if figures else None)


def export(run: str | Path, format: str, out: str | Path | None = None) -> Export:
    """Write a trained student, without distillation heads, into a folder for another library.

    Args:
        run: The run folder.
        format: open_clip, or hf for transformers.
        out: The folder to write; default: `exports/<run>-<format>`.

    Raises:
        UserError: The student cannot be exported; the message says why.
    """
    with status("importing libraries"):
        from student.export import write

    if format not in write.FORMATS:
        raise UserError(f"--format {format}: choose from {', '.join(write.FORMATS)}")
    run = Path(run)
    folder = Path(out) if out else default_export(run, format)
    with status(f"exporting {run}"):
        folder, exported = write.export(run, folder, format)
    return Export(folder, format, exported.call.format(folder), tuple(exported.notes))


def default_export(run: Path, format: str) -> Path:
    """Return `exports/<run>-<format>`."""
    return Path("exports", f"{run.resolve().name}-{format}")


def _text(value: str | Path | None) -> str | None:
    return None if value is None else str(value)


def _texts(models: str | Path | Sequence[str | Path]) -> list[str]:
    return [str(models)] if isinstance(models, str | Path) else [str(model) for model in models]


def _settings(settings: Settings) -> list[str]:
    """Return settings as texts KEY=VALUE."""
    if not isinstance(settings, Mapping):
        return list(settings)
    return [f"{key}={value}" for key, value in settings.items()]
