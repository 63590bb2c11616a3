"""Evaluation tasks by name: ordinary dicts of functions, (encoder or answerer, manifest) or (matcher, folder)."""

from collections.abc import Callable
from pathlib import Path
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


def _vcr(answerer: Any, manifest: Any) -> dict[str, Any]:
    from evaluation.tasks.vcr import evaluate

    return evaluate(answerer, manifest)


def _snli_ve(answerer: Any, manifest: Any) -> dict[str, Any]:
    from evaluation.tasks.snli_ve import evaluate

    return evaluate(answerer, manifest)


def _vqa(answerer: Any, manifest: Any) -> dict[str, Any]:
    from evaluation.tasks.vqa import evaluate

    return evaluate(answerer, manifest)


def _winoground(matcher: Any, data: Path) -> dict[str, Any]:
    from evaluation.tasks.winoground import evaluate

    return evaluate(matcher, data)


def _aro(matcher: Any, data: Path) -> dict[str, Any]:
    from evaluation.tasks.aro import evaluate

    return evaluate(matcher, data)


def _sugar_crepe(matcher: Any, data: Path) -> dict[str, Any]:
    from evaluation.tasks.sugar_crepe import evaluate

    return evaluate(matcher, data)


TASKS: dict[str, Callable[..., dict[str, Any]]] = {
    "zeroshot_classification": _zeroshot,
    "zeroshot_retrieval": _retrieval,
    "imagenet": _imagenet,
    "linear_probe": _linear_probe,
    "coco_detection": _coco_detection,
}
# Tasks of a model that chooses answers: these take an Answerer, those above an Encoder
ANSWERED: dict[str, Callable[..., dict[str, Any]]] = {"vcr": _vcr, "snli_ve": _snli_ve, "vqa": _vqa}
# Tasks that ask which text fits a picture, so that a diffusion model answers too: these take a Matcher and a folder
MATCHED: dict[str, Callable[..., dict[str, Any]]] = {
    "winoground": _winoground,
    "aro": _aro,
    "sugar_crepe": _sugar_crepe,
}
SHORT = {"zeroshot": "zeroshot_classification", "retrieval": "zeroshot_retrieval"}


def find(name: str) -> tuple[str, Callable[..., dict[str, Any]]]:
    """Full name and function of a task."""
    full = SHORT.get(name, name)
    return full, resolve(full, TASKS | ANSWERED | MATCHED, kind="task")
