"""Measure students during and after training, and keep the results in their run folders."""

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from evaluation.models.encoder import Encoder
from evaluation.results.figures import draw_data, draw_suite
from evaluation.results.run import (
    run_answered,
    run_generated,
    run_language,
    run_matched,
    run_task,
    scorer,
)
from evaluation.results.suite import Report, run_suite
from evaluation.results.suite_tables import write_suite
from evaluation.tasks.registry import ANSWERED, GENERATED, LANGUAGE, MATCHED
from student.inference.answerer import find_answerers, is_task_run, load_task_model, run_answerer
from student.inference.generator import load_generator
from student.inference.load import find_encoder, find_matcher, run_encoder
from student.models.seq2seq.language_model import language_model_of
from student.recipe import Run
from teachercache.core.device import pick_device
from teachercache.core.paths import write_whole
from teachercache.core.progress import say

Result = dict[str, Any]  # JSON: task, dataset, model, metrics


# ----------------------------------------------------------------------------------------------------
# While training


def score_while_training(run: Run) -> Callable[[Path], tuple[float, dict[str, float]]]:
    """Return the function that scores a run folder, by the kind of student in it."""
    by_encoding: list[Callable[[Encoder], tuple[float, dict[str, float]]]] = []

    def score(folder: Path) -> tuple[float, dict[str, float]]:
        if is_task_run(folder):
            return score_answers(folder, run)
        if not by_encoding:  # opens the data once
            by_encoding.append(encoding_scorer(run))
        return by_encoding[0](run_encoder(folder, device=pick_device()))

    return score


def encoding_scorer(run: Run) -> Callable[[Encoder], tuple[float, dict[str, float]]]:
    """Return the score by `run.eval_task` on the data's val rows, else on its test rows."""
    score, split = scorer(run.eval_task, run.data)
    if split == "test":
        say(
            f"{run.data} has no val rows: the best student is chosen by test rows, on which its result is then too good"
        )
    return score


def score_answers(folder: Path, run: Run) -> tuple[float, dict[str, float]]:
    """Return the mean accuracy of a run on questions, on the data's val rows, else on its test rows."""
    task = load_task_model(folder, device="cpu", cache=run.cache).task.name
    metrics = run_answered(task, [[run_answerer(folder, task, run.data)]], run.data)[0]["metrics"]
    chosen = {key: metrics[key] for key in ("q2a", "qa2r", "accuracy") if isinstance(metrics.get(key), float)}
    return sum(chosen.values()) / len(chosen), chosen


# ----------------------------------------------------------------------------------------------------
# Afterwards


def measure(
    models: tuple[str, ...], task: str, data: str, *, samples: int | None, figures: Path | None
) -> list[Result]:
    """Measure models by a task; results of runs are kept in their folders.

    Args:
        models: Runs, exported folders, caches or teachers by name.
        task: A task of any kind, with its settings.
        data: `--data`.
        samples: Draws of noise per match of a diffusion model.
        figures: Folder for pictures of single rows; None for none.
    """
    if task.partition(":")[0] in GENERATED | LANGUAGE:
        return [measure_writer(model, task, data) for model in models]
    if task in MATCHED:
        matchers = [find_matcher(model, samples) for model in models]
        return [kept(run_matched(task, matcher, data), folder) for matcher, folder in matchers]
    if task in ANSWERED:
        answering = [find_answerers(model, task, data) for model in models]
        results = run_answered(task, [ways for ways, _ in answering], data)
        for ways, folder in answering:
            kept(next(result for result in results if result["pretrained"] == ways[0].pretrained), folder)
        return results
    loaded = [find_encoder(model) for model in models]
    results = [run_task(task, encoder, data) for encoder, _ in loaded]
    for result, (_, folder) in zip(results, loaded, strict=True):
        kept(result, folder)
    if figures:
        for path in draw_data([encoder for encoder, _ in loaded], task, data, figures):
            say(f"wrote {path}")
    return results


def measure_suite(models: tuple[str, ...], data: str, out: Path, figures: Path | None) -> Report:
    """Measure encoders on every data set below `data`, and write the tables."""
    loaded = [find_encoder(model) for model in models]
    draw = functools.partial(draw_suite, figures) if figures else None
    report = run_suite([encoder for encoder, _ in loaded], Path(data), seen=draw)
    for result in report.results:
        folders = [folder for encoder, folder in loaded if encoder.pretrained == result["pretrained"]]
        kept(result, folders[0] if folders else None)
    say("wrote " + ", ".join(map(str, write_suite(report, out))))
    return report


def measure_writer(model: str, task: str, data: str) -> Result:
    """Measure a model that writes, or the language model that it is or contains."""
    path = Path(model)
    if task.partition(":")[0] in LANGUAGE:
        with language_model_of(path) as folder:
            result = run_language(task, model, data, str(folder))
    else:
        result = run_generated(task, load_generator(path, device=pick_device()), data)
    return kept(result, path if (path / "run.json").exists() else None)


def kept(result: Result, folder: Path | None) -> Result:
    """Write a result, and the texts that it came with, into a run folder; return the result without the texts."""
    texts = result.pop("results", None)
    if folder is not None:
        for inner, content in (("eval", result), ("written", texts)):
            if content is not None:
                path = folder / inner / f"{result['dataset']}_{result['task']}.json".replace(":", "-")
                path.parent.mkdir(exist_ok=True)
                write_whole(path, json.dumps(content) + "\n")
    return result
