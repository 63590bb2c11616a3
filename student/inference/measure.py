"""Measure students during and after training."""

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from evaluation.models.language_model import LanguageModel
from evaluation.results.figures import draw_data, draw_suite
from evaluation.results.run import Result, headline, keep_result, measure, scorer
from evaluation.results.suite import Report, run_suite
from evaluation.results.suite_tables import write_suite
from evaluation.tasks.registry import find as find_task
from evaluation.tasks.task import Kind, Task
from student.inference.answerer import find_answerers, load_task_model, run_answerer
from student.inference.generator import load_generator
from student.inference.load import find_encoder, find_matcher, run_encoder
from student.models.seq2seq.language_model import language_model_of
from student.recipe import Recipe, Run
from student.rows import Questions
from student.training.best import Evaluate
from teachercache.core.device import pick_device
from teachercache.core.progress import say


def score_while_training(recipe: Recipe[Any], run: Run) -> Evaluate:
    """Return the function that scores a run folder, for the kind of rows that the recipe trains on."""
    if isinstance(recipe.rows(recipe.constants), Questions):
        return lambda folder: score_answers(folder, run)
    score, split = scorer(find_task(run.eval_task), run.data)
    if split == "test":
        say(
            f"{run.data} has no val rows: the best student is chosen by test rows, on which its result is then too good"
        )
    return lambda folder: score(run_encoder(folder, device=pick_device()))


def score_answers(folder: Path, run: Run) -> tuple[float, dict[str, float]]:
    """Return the headline metrics of a run on questions, on the data's val rows, else on its test rows."""
    task = find_task(load_task_model(folder, device="cpu", cache=run.cache).task.name)
    (result,) = measure(task, [[run_answerer(folder, task.name, run.data)]], run.data)
    return headline(task, result["metrics"])


def measure_models(
    models: Sequence[str], task: Task, data: str, *, samples: int | None = None, figures: Path | None = None
) -> list[Result]:
    """Measure models by name on a task; results of runs are kept in their folders.

    Args:
        models: Runs, caches, folders or teachers' names.
        task: From `evaluation.tasks.registry.find`.
        data: `--data`.
        samples: Draws of noise for each match of a diffusion model.
        figures: A folder for figures of an ENCODER task.
    """
    if task.kind in (Kind.GENERATOR, Kind.LANGUAGE_MODEL):
        return [_measure_writer(model, task, data) for model in models]
    if task.kind is Kind.ANSWERER:
        loaded: list[tuple[Any, Path | None]] = [find_answerers(model, task.name, data) for model in models]
        folders = {ways[0].pretrained: folder for ways, folder in loaded}
    else:
        matching = task.kind is Kind.MATCHER
        loaded = [find_matcher(model, samples) if matching else find_encoder(model) for model in models]
        folders = {model.pretrained: folder for model, folder in loaded}
    results = []
    for result in measure(task, [model for model, _ in loaded], data):
        # Of several ways to answer the first is kept
        keep_result(result, folders.pop(result["pretrained"], None))
        results.append(result)
    if figures:
        for path in draw_data([encoder for encoder, _ in loaded], task, data, figures):
            say(f"wrote {path}")
    return results


def _measure_writer(name: str, task: Task, data: str) -> Result:
    """Measure a model that writes, or the language model that it is or contains."""
    path = Path(name)
    if task.kind is Kind.LANGUAGE_MODEL:
        with language_model_of(path) as folder:
            (result,) = measure(task, [LanguageModel(path.name, name, str(folder))], data)
    else:
        (result,) = measure(task, [load_generator(path, device=pick_device())], data)
    keep_result(result, path if (path / "run.json").exists() else None)
    return result


def measure_suite(models: Sequence[str], data: str, out: Path, figures: Path | None) -> Report:
    """Measure models on every data set found below `data`, and write the tables to `out`."""
    loaded = [find_encoder(model) for model in models]
    seen = functools.partial(draw_suite, figures) if figures else None
    report = run_suite([encoder for encoder, _ in loaded], Path(data), seen=seen)
    for result in report.results:
        folders = [folder for encoder, folder in loaded if encoder.pretrained == result["pretrained"]]
        keep_result(result, folders[0] if folders else None)
    say("wrote " + ", ".join(map(str, write_suite(report, out))))
    return report
