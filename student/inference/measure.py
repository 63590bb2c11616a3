"""Measure students during and after training, beside any other model that evaluation tasks take."""

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from evaluation.models.encoder import Encoder
from evaluation.models.language_model import LanguageModel
from evaluation.results.figures import draw_data, draw_suite
from evaluation.results.run import Model, Result, headline, keep_result, measure, scorer
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
    """Return the function that scores a run folder during training, for the recipe's kind of rows."""
    if isinstance(recipe.rows(recipe.constants), Questions):
        return lambda folder: score_answers(folder, run)
    score, split = scorer(find_task(run.eval_task), run.data)
    if split == "test":
        say(
            f"WARNING: {run.data} has no val rows: the best student is chosen on test rows, so that its "
            "result on them will be too optimistic"
        )
    return lambda folder: score(run_encoder(folder, device=pick_device()))


def score_answers(folder: Path, run: Run) -> tuple[float, dict[str, float]]:
    """Return the score and headline metrics of a run on question rows.

    The rows are those of the val split, or of the test split if there is no val split.
    """
    task = find_task(load_task_model(folder, device="cpu", cache=run.cache).task.name)
    (result,) = measure(task, [[run_answerer(folder, task.name, run.data)]], run.data)
    return headline(task, result["metrics"])


def measure_models(
    models: Sequence[str], task: Task, data: str, *, samples: int | None = None, figures: Path | None = None
) -> list[Result]:
    """Measure models on a task, and keep the results of runs in their folders.

    Args:
        models: Run folders, caches, exported folders or teachers' names.
        task: A task from `evaluation.tasks.registry.find`.
        data: `--data`.
        samples: Noise draws per match of a diffusion model; None for the default.
        figures: The folder for figures of an ENCODER task; None to draw none.

    Returns:
        A result for each model and each way in which it answers, and for an ensemble of several answering
        models.
    """
    if task.kind in (Kind.GENERATOR, Kind.LANGUAGE_MODEL):
        return [_measure_writer(model, task, data) for model in models]
    encoders: list[Encoder] = []
    measured: Sequence[Model]
    if task.kind is Kind.ANSWERER:
        answerers = [find_answerers(model, task.answers or task.name, data) for model in models]
        measured = [ways for ways, _ in answerers]
        folders = {ways[0].pretrained: folder for ways, folder in answerers}
    elif task.kind is Kind.MATCHER:
        matchers = [find_matcher(model, samples) for model in models]
        measured = [matcher for matcher, _ in matchers]
        folders = {matcher.pretrained: folder for matcher, folder in matchers}
    else:
        loaded = [find_encoder(model) for model in models]
        measured = encoders = [encoder for encoder, _ in loaded]
        folders = {encoder.pretrained: folder for encoder, folder in loaded}
    results = []
    for result in measure(task, measured, data):
        # Of a run that answers in several ways, the first result is kept
        keep_result(result, folders.pop(result["pretrained"], None))
        results.append(result)
    if figures:
        for path in draw_data(encoders, task, data, figures):
            say(f"wrote {path}")
    return results


def _measure_writer(name: str, task: Task, data: str) -> Result:
    """Measure a model that generates texts, or the language model in a run or folder."""
    path = Path(name)
    if task.kind is Kind.LANGUAGE_MODEL:
        with language_model_of(path) as folder:
            (result,) = measure(task, [LanguageModel(path.name, name, str(folder))], data)
    else:
        (result,) = measure(task, [load_generator(path, device=pick_device())], data)
    keep_result(result, path if (path / "run.json").exists() else None)
    return result


def measure_suite(models: Sequence[str], data: str, out: Path, figures: Path | None) -> Report:
    """Measure models on every data set below a folder (`--task all`), and write the tables.

    Args:
        models: Run folders, exported folders or teachers' names.
        data: The folder of the data sets.
        out: The folder for the tables.
        figures: The folder for figures; None to draw none.

    Returns:
        The results, and the data sets that were skipped.
    """
    loaded = [find_encoder(model) for model in models]
    draw = functools.partial(draw_suite, figures) if figures else None
    report = run_suite([encoder for encoder, _ in loaded], Path(data), seen=draw)
    for result in report.results:
        folders = [folder for encoder, folder in loaded if encoder.pretrained == result["pretrained"]]
        keep_result(result, folders[0] if folders else None)
    say("wrote " + ", ".join(map(str, write_suite(report, out))))
    return report
