"""Measure models on a task. Results have the JSON form that clip-benchmark writes."""

import json
import statistics
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NotRequired, TypedDict

import numpy as np

from evaluation.data.splits import VAL_FIRST, known_splits, rows_in
from evaluation.models.answerer import Answerer, ensemble
from evaluation.models.encoder import Encoder
from evaluation.models.generator import Generator
from evaluation.models.language_model import LanguageModel
from evaluation.models.matcher import Matcher
from evaluation.tasks.registry import selection_of
from evaluation.tasks.task import Kind, Metric, Metrics, Task
from teachercache.core.digests import write_proved
from teachercache.core.errors import UserError, calling
from teachercache.core.leftovers import sweep
from teachercache.core.paths import closest_path
from teachercache.core.progress import printable
from teachercache.data.read import read_manifest

NamedModel = Encoder | Answerer | Matcher | Generator | LanguageModel
Model = Encoder | Sequence[Answerer] | Matcher | Generator | LanguageModel


class Result(TypedDict):
    """The result of one model on one task, as clip-benchmark writes it."""

    dataset: str
    model: str
    pretrained: str
    task: str
    language: str
    metrics: Metrics
    results: NotRequired[Metric]  # generated texts, one JSON object each


# ----------------------------------------------------------------------------------------------------
# One function for each kind of model


def measure(task: Task, models: Sequence[Model], data: str) -> Iterator[Result]:
    """Measure models on a task, one after the other; each result is yielded as soon as it is there.

    Args:
        task: The task, from `evaluation.tasks.registry.find`.
        models: Models of the task's kind. For an ANSWERER task each model is a list of Answerers, the ways in which it
            can answer: each way gets a result, and the first ways of several models also form an ensemble.
        data: `--data`: a folder for a MATCHER task, whatever the task reads for a LANGUAGE_MODEL task, and anything
            that `read_manifest` opens for the others.

    Raises:
        UserError: If the data cannot be read or do not fit the task.
    """
    return MEASURES[task.kind](task, models, data)


def _measure_on_rows(
    task: Task, models: Sequence[Encoder | Answerer | Generator], data: str
) -> Iterator[Result]:
    manifest = read_manifest(data)
    for model in models:
        metrics = dict(_metrics(task, model, manifest))
        texts = metrics.pop("results", None)
        result = result_of(task.name, model, manifest.data, metrics)
        yield result if texts is None else {**result, "results": texts}


def _metrics(task: Task, *arguments: object, **options: object) -> Metrics:
    """Call the function of a task; an exception of another package's task names the task."""
    with calling(f"task {task.name}: function", task.function):
        return task.function(*arguments, **options)


def _measure_answerers(task: Task, models: Sequence[Sequence[Answerer]], data: str) -> Iterator[Result]:
    answerers = [answerer for ways in models for answerer in ways]
    if len(models) > 1:
        answerers.append(ensemble([ways[0] for ways in models]))
    return _measure_on_rows(task, answerers, data)


def _measure_matchers(task: Task, models: Sequence[Matcher], data: str) -> Iterator[Result]:
    if not Path(data).is_dir():
        raise UserError(
            f"no folder {data}: {closest_path(data)}--task {task.name} needs the folder of the published data set"
        )
    for matcher in models:
        yield result_of(task.name, matcher, data, _metrics(task, matcher, Path(data)))


def _measure_language_models(task: Task, models: Sequence[LanguageModel], data: str) -> Iterator[Result]:
    for model in models:
        yield result_of(task.name, model, data, _metrics(task, model.folder, data))


MEASURES: dict[Kind, Callable[..., Iterator[Result]]] = {
    Kind.ENCODER: _measure_on_rows,
    Kind.ANSWERER: _measure_answerers,
    Kind.MATCHER: _measure_matchers,
    Kind.GENERATOR: _measure_on_rows,
    Kind.LANGUAGE_MODEL: _measure_language_models,
}


# ----------------------------------------------------------------------------------------------------
# Checkpoint selection


def scorer(task: Task, data: str) -> tuple[Callable[[Encoder], tuple[float, dict[str, float]]], str]:
    """Return a function that scores a checkpoint, and the split that it measures.

    Args:
        task: An ENCODER task with a `selection`.
        data: Anything that `read_manifest` opens.

    Returns:
        A function from an encoder to (score, metrics), where the score is the mean of the metrics; and the split: val
        if it has usable rows, otherwise test.

    Raises:
        UserError: If the task cannot choose checkpoints, or no split has usable rows.
    """
    selection = selection_of(task)
    manifest = read_manifest(data, quiet=True)
    usable = np.array(selection.usable(manifest), bool)
    present = set(known_splits(manifest))
    splits = [split for split in VAL_FIRST if split in present and usable[rows_in(manifest, split)].any()]
    if not splits:
        raise UserError(f"{data} has no val or test rows with a {selection.needs}: leave --eval-every away")

    def score(encoder: Encoder) -> tuple[float, dict[str, float]]:
        return headline(task, _metrics(task, encoder, manifest, split=splits[0]))

    return score, splits[0]


def headline(task: Task, metrics: Metrics) -> tuple[float, dict[str, float]]:
    """Return the mean of the task's headline metrics that could be computed, and these metrics.

    Raises:
        UserError: If none of them could be computed.
    """
    chosen: dict[str, float] = {}
    for key in task.headline:
        value = metrics.get(key)
        if isinstance(value, float):
            chosen[key] = value
    if not chosen:
        raise UserError(f"{task.name} has no value for {', '.join(task.headline)}: give it more rows")
    return statistics.mean(chosen.values()), chosen


# ----------------------------------------------------------------------------------------------------
# Results


def result_of(task: str, model: NamedModel, data: str, metrics: Metrics) -> Result:
    """Return a result in clip-benchmark's JSON form; the data set is named after the last part of `data`."""
    return {
        "dataset": data.rstrip("/").rsplit("/", 1)[-1],
        "model": model.name,
        "pretrained": model.pretrained,
        "task": task,
        "language": "en",
        "metrics": metrics,
    }


def keep_result(result: Result, folder: Path | None) -> None:
    """Write a result into `eval/` of a run folder, and generated texts into `written/`.

    Args:
        result: The result; its `results` are removed, so that the caller prints the metrics alone.
        folder: The run folder, or None to write nothing.
    """
    texts = result.pop("results", None)
    if folder is None:
        return
    sweep(folder)
    name = f"{result['dataset']}_{result['task']}.json".replace(":", "-")
    for inner, content in (("eval", result), ("written", texts)):
        if content is not None:
            path = folder / inner / name
            path.parent.mkdir(exist_ok=True)
            write_proved(path, folder, json.dumps(content) + "\n")


def table(results: Sequence[Result]) -> str:
    """Format results as text: a row for each metric, a column for each result; "-" for a missing metric."""
    names = list(dict.fromkeys(name for result in results for name in result["metrics"]))
    header = ["metric", *(result["model"] for result in results)]
    lines = [header, *([name, *(_cell(result["metrics"].get(name)) for result in results)] for name in names)]
    lines = [[printable(cell) for cell in line] for line in lines]
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )


def _cell(value: Metric) -> str:
    if value is None:
        return "-"
    return f"{value:.4f}" if isinstance(value, float) else str(value)
