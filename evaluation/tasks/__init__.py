"""Evaluation tasks by name: an ordinary dict of functions (encoder, manifest) -> metrics."""

from collections.abc import Callable
from typing import Any

from teachercache.names import resolve


def _retrieval(encoder: Any, manifest: Any) -> dict[str, Any]:
    from evaluation.tasks.retrieval import evaluate

    return evaluate(encoder, manifest)


def _zeroshot(encoder: Any, manifest: Any) -> dict[str, Any]:
    from evaluation.tasks.zeroshot import evaluate

    return evaluate(encoder, manifest)


TASKS: dict[str, Callable[[Any, Any], dict[str, Any]]] = {
    "zeroshot_classification": _zeroshot,
    "zeroshot_retrieval": _retrieval,
}
SHORT = {"zeroshot": "zeroshot_classification", "retrieval": "zeroshot_retrieval"}


def find(name: str) -> tuple[str, Callable[[Any, Any], dict[str, Any]]]:
    """Full name and function of a task."""
    full = SHORT.get(name, name)
    return full, resolve(full, TASKS, kind="task")
