"""Evaluation tasks by name: an ordinary dict of functions (encoder, manifest) -> metrics."""

from collections.abc import Callable
from typing import Any

from teachercache.names import resolve


def _retrieval(encoder: Any, manifest: Any, split: str = "test") -> dict[str, Any]:
    from evaluation.tasks.retrieval import evaluate

    return evaluate(encoder, manifest, split)


def _zeroshot(encoder: Any, manifest: Any, split: str = "test") -> dict[str, Any]:
    from evaluation.tasks.zeroshot import evaluate

    return evaluate(encoder, manifest, split)


def _imagenet(encoder: Any, manifest: Any) -> dict[str, Any]:
    from evaluation.tasks.imagenet import evaluate

    return evaluate(encoder, manifest)


def _linear_probe(encoder: Any, manifest: Any) -> dict[str, Any]:
    from evaluation.tasks.linear_probe import evaluate

    return evaluate(encoder, manifest)


def _coco_detection(encoder: Any, manifest: Any) -> dict[str, Any]:
    from evaluation.tasks.coco_detection import evaluate

    return evaluate(encoder, manifest)


TASKS: dict[str, Callable[..., dict[str, Any]]] = {
    "zeroshot_classification": _zeroshot,
    "zeroshot_retrieval": _retrieval,
    "imagenet": _imagenet,
    "linear_probe": _linear_probe,
    "coco_detection": _coco_detection,
}
SHORT = {"zeroshot": "zeroshot_classification", "retrieval": "zeroshot_retrieval"}


def find(name: str) -> tuple[str, Callable[..., dict[str, Any]]]:
    """Full name and function of a task."""
    full = SHORT.get(name, name)
    return full, resolve(full, TASKS, kind="task")
