"""Evaluation tasks by name: ordinary dicts of functions (a model, data) -> metrics."""

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

from teachercache.core.errors import UserError, resolve


def _retrieval(encoder: Any, manifest: Any, split: str = "test") -> dict[str, Any]:
    from evaluation.tasks.encoding.retrieval import evaluate

    return evaluate(encoder, manifest, split)


def _zeroshot(encoder: Any, manifest: Any, split: str = "test") -> dict[str, Any]:
    from evaluation.tasks.encoding.zeroshot import evaluate

    return evaluate(encoder, manifest, split)


def _imagenet(encoder: Any, manifest: Any) -> dict[str, Any]:
    from evaluation.tasks.encoding.imagenet import evaluate

    return evaluate(encoder, manifest)


def _linear_probe(encoder: Any, manifest: Any) -> dict[str, Any]:
    from evaluation.tasks.encoding.linear_probe import evaluate

    return evaluate(encoder, manifest)


def _coco_detection(encoder: Any, manifest: Any) -> dict[str, Any]:
    from evaluation.tasks.encoding.coco_detection import evaluate

    return evaluate(encoder, manifest)


def _vcr(answerer: Any, manifest: Any) -> dict[str, Any]:
    from evaluation.tasks.answering.vcr import evaluate

    return evaluate(answerer, manifest)


def _snli_ve(answerer: Any, manifest: Any) -> dict[str, Any]:
    from evaluation.tasks.answering.snli_ve import evaluate

    return evaluate(answerer, manifest)


def _vqa(answerer: Any, manifest: Any) -> dict[str, Any]:
    from evaluation.tasks.answering.vqa import evaluate

    return evaluate(answerer, manifest)


def _captions(generator: Any, manifest: Any, **settings: Any) -> dict[str, Any]:
    from evaluation.tasks.writing.captions import evaluate

    return evaluate(generator, manifest, **settings)


def _open_vqa(generator: Any, manifest: Any, **settings: Any) -> dict[str, Any]:
    from evaluation.tasks.writing.open_vqa import evaluate

    return evaluate(generator, manifest, **settings)


def _glue(folder: str, data: str, **settings: Any) -> dict[str, Any]:
    from evaluation.probes.finetune_text import Options
    from evaluation.tasks.language.glue import evaluate

    return evaluate(folder, data, Options(**settings))


def _xsum(folder: str, data: str, **settings: Any) -> dict[str, Any]:
    from evaluation.tasks.language.xsum import BART, evaluate

    return evaluate(folder, data, dataclasses.replace(BART, **settings))


def _text_loss(folder: str, data: str) -> dict[str, Any]:
    from evaluation.tasks.language.text_loss import evaluate

    return evaluate(folder, data)


def _winoground(matcher: Any, data: Path) -> dict[str, Any]:
    from evaluation.tasks.matching.winoground import evaluate

    return evaluate(matcher, data)


def _aro(matcher: Any, data: Path) -> dict[str, Any]:
    from evaluation.tasks.matching.aro import evaluate

    return evaluate(matcher, data)


def _sugar_crepe(matcher: Any, data: Path) -> dict[str, Any]:
    from evaluation.tasks.matching.sugar_crepe import evaluate

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
# Tasks of a model that writes: these take a Generator
GENERATED: dict[str, Callable[..., dict[str, Any]]] = {"captions": _captions, "open_vqa": _open_vqa}
# Tasks of a language model: these take a transformers folder and where the data lie
LANGUAGE: dict[str, Callable[..., dict[str, Any]]] = {"glue": _glue, "xsum": _xsum, "text_loss": _text_loss}
Settings = dict[str, Callable[[str], Any]]
FITTING: Settings = {
    "epochs": int,
    "batch": int,
    "lr": float,
    "weight_decay": float,
    "longest": int,
    "seed": int,
}
# What may stand behind a task's name: `captions:masks=8`, `glue:lr=1e-4,epochs=3`
SETTINGS: dict[str, Settings] = {
    "captions": {"masks": int, "beams": int, "java": int},
    "open_vqa": {"masks": int, "beams": int},
    "glue": FITTING,
    "xsum": FITTING,
}
# Tasks that ask which text fits a picture, so that a diffusion model answers too: these take a Matcher and a folder
MATCHED: dict[str, Callable[..., dict[str, Any]]] = {
    "winoground": _winoground,
    "aro": _aro,
    "sugar_crepe": _sugar_crepe,
}
SHORT = {"zeroshot": "zeroshot_classification", "retrieval": "zeroshot_retrieval"}


def find(name: str) -> tuple[str, Callable[..., dict[str, Any]]]:
    """Full name and function of a task; settings behind a colon are the function's."""
    short, colon, given = name.partition(":")
    base = SHORT.get(short, short)
    full = base + colon + given
    table = TASKS | ANSWERED | GENERATED | LANGUAGE | MATCHED
    if colon and base in table:
        return full, functools.partial(table[base], **_settings(base, given))
    return full, resolve(full, table, kind="task")


def _settings(task: str, given: str) -> dict[str, Any]:
    """`a=1,b=2` as what the task takes; UserError says what that is."""
    known, found = SETTINGS.get(task, {}), {}
    for part in given.split(","):
        key, _, value = part.partition("=")
        try:
            found[key] = known[key](value)
        except (KeyError, ValueError) as error:
            choices = ", ".join(f"{name}=NUMBER" for name in known)
            raise UserError(
                f"--task {task}:{part}: " + (f"choose from {choices}" if known else f"{task} has no settings")
            ) from error
        if found[key] <= 0 and key not in ("seed", "weight_decay", "java"):
            raise UserError(f"--task {task}:{part}: give a number above 0")
    return found
