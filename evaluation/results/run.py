"""Results as clip-benchmark writes them, and as a table to read."""

import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from evaluation.models.answerer import Answerer, ensemble
from evaluation.models.encoder import Encoder
from evaluation.models.generator import Generator
from evaluation.models.matcher import Matcher
from evaluation.tasks.registry import find
from teachercache.core.errors import UserError
from teachercache.data.read import read_manifest

# What a task's result is as one number, the mean of these
SCORES = {
    "zeroshot_classification": ("acc1",),
    "zeroshot_retrieval": ("image_retrieval_recall@1", "text_retrieval_recall@1"),
}


def scorer(task: str, data: str) -> tuple[Callable[[Encoder], tuple[float, dict[str, float]]], str]:
    """A function of an encoder that gives one score and what it is the mean of; and the split that it looks at."""
    name, evaluate = find(task)
    if name not in SCORES:
        raise UserError(f"--set run.eval_task={task}: choose from zeroshot, retrieval")
    manifest = read_manifest(data)
    needed, labels = manifest.has_text(), manifest.column("label")
    what = "text"
    if name == "zeroshot_classification":
        needed, what = np.array([bool(label) for label in labels]), "label"
    splits = set(manifest.column("split"))
    found = [
        split
        for split in ("val", "validation", "test")
        if split in splits and needed[manifest.rows_of_split(split)].any()
    ]
    if not found:
        raise UserError(f"{data} has no val or test rows with a {what}: leave --eval-every away")

    def score(encoder: Encoder) -> tuple[float, dict[str, float]]:
        metrics = evaluate(encoder, manifest, split=found[0])
        chosen = {key: metrics[key] for key in SCORES[name]}
        return statistics.mean(chosen.values()), chosen

    return score, found[0]


def run_task(task: str, encoder: Encoder, data: str) -> dict[str, Any]:
    """One result in clip-benchmark's JSON shape."""
    name, evaluate = find(task)
    manifest = read_manifest(data)
    return result_of(name, encoder, manifest.data, evaluate(encoder, manifest))


def run_answered(task: str, models: Sequence[Sequence[Answerer]], data: str) -> list[dict[str, Any]]:
    """One result for each way in which each model answers; of several models also that of their ensemble.

    A model that answers in several ways has the first of them in the ensemble.
    """
    name, evaluate = find(task)
    manifest = read_manifest(data)
    found = [one for model in models for one in model]
    found += [ensemble([model[0] for model in models])] if len(models) > 1 else []
    return [result_of(name, one, manifest.data, evaluate(one, manifest)) for one in found]


def run_generated(task: str, generator: Generator, data: str) -> dict[str, Any]:
    """One result of a model that writes; what it wrote beside the metrics, under `results`."""
    name, evaluate = find(task)
    manifest = read_manifest(data)
    metrics = evaluate(generator, manifest)
    return {"results": metrics.pop("results"), **result_of(name, generator, manifest.data, metrics)}


class LanguageModel(NamedTuple):
    """What a result says of a model whose language is measured."""

    name: str
    pretrained: str


def run_language(task: str, model: str, data: str, folder: str) -> dict[str, Any]:
    """One result of a model's language model, which lies in a transformers folder."""
    name, evaluate = find(task)
    return result_of(name, LanguageModel(Path(model).name, model), data, evaluate(folder, data))


def run_matched(task: str, matcher: Matcher, data: str) -> dict[str, Any]:
    """The result of a task that asks which text fits a picture; its data lie in a local folder."""
    name, evaluate = find(task)
    if not Path(data).is_dir():
        raise UserError(f"no folder {data}: --task {name} wants the folder that the published set lies in")
    return result_of(name, matcher, data, evaluate(matcher, Path(data)))


def result_of(
    task: str,
    model: Encoder | Answerer | Matcher | Generator | LanguageModel,
    data: str,
    metrics: dict[str, Any],
) -> dict[str, Any]:
    """clip-benchmark's JSON shape."""
    return {
        "dataset": data.rstrip("/").rsplit("/", 1)[-1],
        "model": model.name,
        "pretrained": model.pretrained,
        "task": task,
        "language": "en",
        "metrics": metrics,
    }


def table(results: list[dict[str, Any]]) -> str:
    """Metrics as rows, one column per result; a metric that was not computed shows as -."""
    names = list(dict.fromkeys(name for result in results for name in result["metrics"]))
    header = ["metric", *(result["model"] for result in results)]
    lines = [header, *([name, *(_cell(result["metrics"].get(name)) for result in results)] for name in names)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.4f}" if isinstance(value, float) else str(value)
