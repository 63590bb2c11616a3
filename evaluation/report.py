"""Results as clip-benchmark writes them, and as a table to read."""

import statistics
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from evaluation.answerer import Answerer, ensemble
from evaluation.encoder import Encoder
from evaluation.generator import Generator
from evaluation.tasks import find
from teachercache.names import UserError
from teachercache.readers import read_manifest
from teachercache.samples import Manifest

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
    found = [split for split in ("val", "validation", "test")
             if split in splits and needed[manifest.rows_of_split(split)].any()]  # fmt: skip
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
    return _result(name, encoder, manifest, evaluate(encoder, manifest))


def run_answered(task: str, models: Sequence[Sequence[Answerer]], data: str) -> list[dict[str, Any]]:
    """One result for each way in which each model answers; of several models also that of their ensemble.

    A model that answers in several ways has the first of them in the ensemble.
    """
    name, evaluate = find(task)
    manifest = read_manifest(data)
    found = [one for model in models for one in model]
    found += [ensemble([model[0] for model in models])] if len(models) > 1 else []
    return [_result(name, one, manifest, evaluate(one, manifest)) for one in found]


def run_generated(task: str, generator: Generator, data: str) -> dict[str, Any]:
    """One result of a model that writes; what it wrote beside the metrics, under `results`."""
    name, evaluate = find(task)
    manifest = read_manifest(data)
    metrics = evaluate(generator, manifest)
    return {"results": metrics.pop("results"), **_result(name, generator, manifest, metrics)}


def run_language(task: str, model: str, data: str, folder: str) -> dict[str, Any]:
    """One result of a model's language model, which lies in a transformers folder."""
    name, evaluate = find(task)
    return _shape(name, data, model.rstrip("/").rsplit("/", 1)[-1], model, evaluate(folder, data))


def _result(task: str, model: Encoder | Answerer | Generator, manifest: Manifest,
            metrics: dict[str, Any]) -> dict[str, Any]:  # fmt: skip
    return _shape(task, manifest.data, model.name, model.pretrained, metrics)


def _shape(task: str, data: str, model: str, pretrained: str, metrics: dict[str, Any]) -> dict[str, Any]:
    return {
        "dataset": data.rstrip("/").rsplit("/", 1)[-1],
        "model": model,
        "pretrained": pretrained,
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
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines
    )


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.4f}" if isinstance(value, float) else str(value)
