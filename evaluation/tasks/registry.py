"""The evaluation tasks by name: one ordinary dict of `Task` values, and the tasks that other packages install.

The functions below import their task when they are called, so that reading the registry imports no torch.
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import TYPE_CHECKING, Any

from evaluation.tasks.task import Kind, Metrics, Option, Selection, Task, parse_options
from teachercache.core import installed as packages
from teachercache.core.errors import UserError, closest, resolve

if TYPE_CHECKING:
    from evaluation.models.answerer import Answerer
    from evaluation.models.encoder import Encoder
    from evaluation.models.generator import Generator
    from evaluation.models.matcher import Matcher
    from teachercache.data.manifest import Manifest

GROUP = "evaluation.tasks"  # entry points of installed tasks


# ----------------------------------------------------------------------------------------------------
# Tasks of an Encoder


def _classification(encoder: "Encoder", manifest: "Manifest", split: str = "test") -> Metrics:
    from evaluation.tasks.encoding.zeroshot import evaluate

    return evaluate(encoder, manifest, split)


def _retrieval(encoder: "Encoder", manifest: "Manifest", split: str = "test") -> Metrics:
    from evaluation.tasks.encoding.retrieval import evaluate

    return evaluate(encoder, manifest, split)


def _imagenet(encoder: "Encoder", manifest: "Manifest") -> Metrics:
    from evaluation.tasks.encoding.imagenet import evaluate

    return evaluate(encoder, manifest)


def _linear_probe(encoder: "Encoder", manifest: "Manifest") -> Metrics:
    from evaluation.tasks.encoding.linear_probe import evaluate

    return evaluate(encoder, manifest)


def _coco_detection(encoder: "Encoder", manifest: "Manifest") -> Metrics:
    from evaluation.tasks.encoding.coco_detection import evaluate

    return evaluate(encoder, manifest)


def _has_label(manifest: "Manifest") -> Sequence[bool]:
    return [bool(label) for label in manifest.column("label")]


def _has_text(manifest: "Manifest") -> Sequence[bool]:
    return manifest.has_text().tolist()


def _imagenet_words(manifest: "Manifest", rows: Sequence[int]) -> Mapping[str, str]:
    from evaluation.data.imagenet_classes import class_places, class_words

    labels, words = manifest.column("label"), class_words()
    places = class_places({labels[row] for row in rows}, manifest.data)
    return {label: words[place] for label, place in places.items()}


# ----------------------------------------------------------------------------------------------------
# Tasks of an Answerer


def _vcr(answerer: "Answerer", manifest: "Manifest") -> Metrics:
    from evaluation.tasks.answering.vcr import evaluate

    return evaluate(answerer, manifest)


def _snli_ve(answerer: "Answerer", manifest: "Manifest") -> Metrics:
    from evaluation.tasks.answering.snli_ve import evaluate

    return evaluate(answerer, manifest)


def _vqa(answerer: "Answerer", manifest: "Manifest") -> Metrics:
    from evaluation.tasks.answering.vqa import evaluate

    return evaluate(answerer, manifest)


# ----------------------------------------------------------------------------------------------------
# Tasks of a Matcher


def _winoground(matcher: "Matcher", data: Path) -> Metrics:
    from evaluation.tasks.matching.winoground import evaluate

    return evaluate(matcher, data)


def _aro(matcher: "Matcher", data: Path) -> Metrics:
    from evaluation.tasks.matching.aro import evaluate

    return evaluate(matcher, data)


def _sugar_crepe(matcher: "Matcher", data: Path) -> Metrics:
    from evaluation.tasks.matching.sugar_crepe import evaluate

    return evaluate(matcher, data)


# ----------------------------------------------------------------------------------------------------
# Tasks of a Generator


def _captions(generator: "Generator", manifest: "Manifest", **options: Any) -> Metrics:
    from evaluation.tasks.writing.captions import evaluate

    return evaluate(generator, manifest, **options)


def _open_vqa(generator: "Generator", manifest: "Manifest", **options: Any) -> Metrics:
    from evaluation.tasks.writing.open_vqa import evaluate

    return evaluate(generator, manifest, **options)


# ----------------------------------------------------------------------------------------------------
# Tasks of a language model


def _glue(folder: str, data: str, **options: Any) -> Metrics:
    from evaluation.probes.finetune_text import Options
    from evaluation.tasks.language.glue import evaluate

    return evaluate(folder, data, dataclasses.replace(Options(), **options))


def _xsum(folder: str, data: str, **options: Any) -> Metrics:
    from evaluation.tasks.language.xsum import BART, evaluate

    return evaluate(folder, data, dataclasses.replace(BART, **options))


def _text_loss(folder: str, data: str) -> Metrics:
    from evaluation.tasks.language.text_loss import evaluate

    return evaluate(folder, data)


# ----------------------------------------------------------------------------------------------------
# The table

RECALLS = tuple(
    (f"{way}_retrieval_recall@{k}", f"{heading} R@{k}")
    for way, heading in (("image", "T2I"), ("text", "I2T"))
    for k in (1, 5, 10)
)
FINE_TUNING = {
    "epochs": Option(int),
    "batch": Option(int),
    "lr": Option(float),
    "weight_decay": Option(float, zero=True),
    "longest": Option(int),
    "seed": Option(int, zero=True),
}
WRITING = {"masks": Option(int, most=1000), "beams": Option(int, most=1000)}


def _plain(*keys: str) -> tuple[tuple[str, str], ...]:
    """Columns whose headings are the keys with spaces."""
    return tuple((key, key.replace("_", " ")) for key in keys)


TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        Task(
            name="zeroshot_classification",
            kind=Kind.ENCODER,
            function=_classification,
            doc="Zero-shot classification with the folders or labels as classes.",
            short="zeroshot",
            headline=("acc1",),
            columns=(("acc1", "top-1"), ("mean_per_class_recall", "mean per class")),
            selection=Selection(_has_label, "label"),
        ),
        Task(
            name="zeroshot_retrieval",
            kind=Kind.ENCODER,
            function=_retrieval,
            doc="Image-text retrieval in both directions, R@1, R@5 and R@10.",
            short="retrieval",
            headline=("image_retrieval_recall@1", "text_retrieval_recall@1"),
            columns=RECALLS,
            selection=Selection(_has_text, "text"),
        ),
        Task(
            name="imagenet",
            kind=Kind.ENCODER,
            function=_imagenet,
            doc="Zero-shot ImageNet and its variants with CLIP's class names and 80 prompts.",
            headline=("acc1",),
            columns=(("acc1", "top-1"),),
            class_names=_imagenet_words,
        ),
        Task(
            name="linear_probe",
            kind=Kind.ENCODER,
            function=_linear_probe,
            doc="Logistic regression on frozen image features, as in CLIP.",
            headline=("lp_acc1",),
            columns=(("lp_acc1", "top-1"), ("lp_mean_per_class_recall", "mean per class")),
        ),
        Task(
            name="coco_detection",
            kind=Kind.ENCODER,
            function=_coco_detection,
            doc="COCO detection and segmentation by Mask R-CNN on a frozen ResNet.",
            headline=("bbox_AP",),
            columns=_plain("bbox_AP", "segm_AP"),
        ),
        Task(
            name="vcr",
            kind=Kind.ANSWERER,
            function=_vcr,
            doc="Visual Commonsense Reasoning: Q2A, QA2R and Q2AR.",
            headline=("q2a", "qa2r"),
            columns=_plain("q2a", "qa2r", "q2ar"),
        ),
        Task(
            name="snli_ve",
            kind=Kind.ANSWERER,
            function=_snli_ve,
            doc="Visual entailment on SNLI-VE.",
            headline=("accuracy",),
            columns=_plain("accuracy"),
        ),
        Task(
            name="vqa",
            kind=Kind.ANSWERER,
            function=_vqa,
            doc="VQA v2 and OK-VQA with a fixed answer vocabulary, official soft accuracy.",
            headline=("accuracy",),
            columns=_plain("accuracy"),
        ),
        Task(
            name="winoground",
            kind=Kind.MATCHER,
            function=_winoground,
            doc="Winoground: two images, two captions of the same words.",
            columns=_plain("text_score", "image_score", "group_score"),
        ),
        Task(
            name="aro",
            kind=Kind.MATCHER,
            function=_aro,
            doc="ARO: relations, attributes and word order.",
            columns=_plain(
                "relation_macro", "attribution_macro", "aro_overall", "coco_order", "flickr_order"
            ),
        ),
        Task(
            name="sugar_crepe",
            kind=Kind.MATCHER,
            function=_sugar_crepe,
            doc="SugarCrepe: captions against fluent hard negatives.",
            columns=_plain("add", "replace", "swap", "acc"),
        ),
        Task(
            name="captions",
            kind=Kind.GENERATOR,
            function=_captions,
            doc="Captioning: BLEU, METEOR, ROUGE-L, CIDEr and SPICE.",
            options={**WRITING, "java": Option(int, zero=True)},
            headline=("CIDEr",),
            columns=_plain("CIDEr"),
        ),
        Task(
            name="open_vqa",
            kind=Kind.GENERATOR,
            function=_open_vqa,
            doc="VQA v2 and OK-VQA with generated answers.",
            options=WRITING,
            headline=("accuracy",),
            columns=_plain("accuracy"),
        ),
        Task(
            name="glue",
            kind=Kind.LANGUAGE_MODEL,
            function=_glue,
            doc="GLUE by fine-tuning.",
            options=FINE_TUNING,
            headline=("average",),
            columns=_plain("average"),
        ),
        Task(
            name="xsum",
            kind=Kind.LANGUAGE_MODEL,
            function=_xsum,
            doc="XSUM summaries by fine-tuning, ROUGE.",
            options=FINE_TUNING,
            columns=_plain("ROUGE_1", "ROUGE_2", "ROUGE_L"),
        ),
        Task(
            name="text_loss",
            kind=Kind.LANGUAGE_MODEL,
            function=_text_loss,
            doc="Loss of infilling held-out texts.",
            columns=_plain("nll_per_token", "nll_per_masked_token"),
            lower=("nll_per_token", "nll_per_masked_token"),
        ),
    )
}
SHORT = {task.short: name for name, task in TASKS.items() if task.short}


# ----------------------------------------------------------------------------------------------------
# Names to tasks


def installed() -> dict[str, EntryPoint]:
    """Return the entry points of tasks that other packages install, without loading them."""
    return {name: point for name, point in packages.installed(GROUP).items() if name not in TASKS}


def find(name: str) -> Task:
    """Return the task of a name on the command line, with the options behind the name bound to its function.

    Args:
        name: `NAME`, a short name, `NAME:option=number,...`, or `package.module:TASK`. Ours come first, then installed
            tasks, then the import.

    Returns:
        The task; its `name` is the full name with the options, as results have it.

    Raises:
        UserError: If there is no such task, or it has no such option.
    """
    short, colon, text = name.partition(":")
    base = SHORT.get(short, short)
    points = {} if base in TASKS else installed()
    if base in TASKS:
        task = TASKS[base]
    elif base in points:
        task = _load(points[base])
    elif ":" not in name or "." not in short:
        tasks = {point: _loadable(points[point]) for point in points}
        shorts = {task.short: point for point, task in tasks.items() if task and task.short}
        if short not in shorts:
            choices = dict.fromkeys((*TASKS, *SHORT, *points, *shorts))
            return _checked(resolve(name, choices, kind="task"), name)
        base = shorts[short]
        task = _load(points[base])
    else:
        return _checked(resolve(name, dict.fromkeys((*TASKS, *SHORT, *points)), kind="task"), name)
    if not colon:
        return task
    bound = functools.partial(task.function, **parse_options(task, text))
    return dataclasses.replace(task, name=f"{base}:{text}", function=bound)


def _load(point: EntryPoint) -> Task:
    return _checked(packages.load_installed(point), point.value)


def _loadable(point: EntryPoint) -> Task | None:
    """Return an installed task, None if it cannot be imported: another task was asked for."""
    try:
        return _load(point)
    except UserError:
        return None


def _checked(value: Task, place: str) -> Task:
    if type(value) is not Task:
        raise UserError(f"{place} is not a task: make it a `Task` of evaluation.tasks.task")
    return value


def selection_of(task: Task) -> Selection:
    """Return how a task chooses checkpoints; raise UserError with the tasks that do if it does not."""
    if task.selection is None:
        others = [*TASKS.values(), *filter(None, map(_loadable, installed().values()))]
        choices = [other.short or other.name for other in others if other.selection]
        hint = closest(task.name, choices)
        raise UserError(
            f"--set run.eval_task={task.name}: the task has no `selection`: {hint}choose from {', '.join(choices)}"
        )
    return task.selection
