"""Open the training rows, caches and batches of a run, with one function per kind of rows."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from student.contract import RowInputs
from student.ensemble import check_ensemble
from student.inputs.caches import (
    field_shapes,
    find_by_field,
    find_ensemble,
    open_source,
    parts_of,
    readable_rows,
    same_data_cache,
    training_rows,
)
from student.inputs.clip_logits import clip_scorer
from student.inputs.hints import Wanted
from student.inputs.loader import Batches
from student.inputs.order import Order, StepPlan
from student.inputs.pairs import PairBatches, TeacherFields
from student.inputs.question_batches import QuestionBatches, QuestionOrder
from student.inputs.question_rows import QuestionReader
from student.inputs.questions import Task, find_task, labeled_rows, parse_regime
from student.models.single_stream.tokenizer import vocabulary_tokenizer
from student.recipe import Noise, Setting
from student.rows import Pairs, Questions, RowPlan, Texts
from teachercache.cache.store import Cache
from teachercache.core.errors import UserError
from teachercache.core.progress import say
from teachercache.data.read import read_manifest
from teachercache.teachers.registry import find_stored, outputs_for
from teachercache.teachers.teacher import Teacher


@dataclasses.dataclass(frozen=True)
class Feed:
    """Everything besides the data that batches depend on.

    Args:
        inputs: The inputs of the student.
        plan: Steps and ranks.
        noise: Functions that draw the recipe's random arrays per row, by name.
        live: A teacher that runs in the training process and replaces the cached fields.
    """

    inputs: RowInputs
    plan: StepPlan
    noise: Mapping[str, Noise]
    live: Teacher | None = None


@dataclasses.dataclass(frozen=True)
class OpenedRows:
    """Training rows of one run.

    Args:
        setting: The data and caches that the student is built for.
        caches: The caches that are read.
        batches: Builds the batches of a student.
        ensemble: How several teachers are combined; "" for a single one.
        allows_live: Whether --live can replace the caches.
        facts: JSON for run.json, from which rows of the same kind can be read again.
        files: Contents of further text files in the run folder, by file name.
    """

    setting: Setting
    caches: list[Cache]
    batches: Callable[[Feed], Batches]
    ensemble: str = ""
    allows_live: bool = True
    facts: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    files: Mapping[str, str] = dataclasses.field(default_factory=dict)


def open_rows(plan: RowPlan, wanted: Wanted, *, name: str) -> OpenedRows:
    """Open the training rows of a run.

    Args:
        plan: The kind of rows, filled in by the recipe.
        wanted: Data, caches and fields of the run.
        name: Name of the recipe, for messages.

    Raises:
        UserError: There are no rows to train on, or a cache is missing; the message suggests a `tc build`.
    """
    return OPENERS[type(plan)](plan, wanted, name)


# ----------------------------------------------------------------------------------------------------
# Pairs and texts


def _open_pairs(plan: Pairs, wanted: Wanted, name: str) -> OpenedRows:
    return _open_pictures_and_texts(plan, wanted, name, pictures=True)


def _open_texts(plan: Texts, wanted: Wanted, name: str) -> OpenedRows:
    return _open_pictures_and_texts(Pairs(choose_rows=plan.choose_rows), wanted, name, pictures=False)


def _open_pictures_and_texts(plan: Pairs, wanted: Wanted, name: str, *, pictures: bool) -> OpenedRows:
    manifest = read_manifest(wanted.data)
    if plan.ensemble:
        check_ensemble(plan.ensemble)
        caches = find_ensemble(wanted)
    else:
        caches = find_by_field(wanted)
        if len(caches) < len(parts_of(wanted.cache)) > 1 and wanted.fields:
            raise UserError(f"{name} reads one cache, not {len(parts_of(wanted.cache))}: pass one as --cache")
    if len(caches) > 1 and plan.ensemble:
        say(f"{len(caches)} teachers, {plan.ensemble}: {', '.join(cache.meta.spec.name for cache in caches)}")
    # A cache of the same data stores which pictures can be decoded, so they are not decoded again
    views = caches[0] if caches else same_data_cache(wanted.cache, manifest)
    holding: list[Cache | None] = [*caches] or [views]
    rows = functools.reduce(np.intersect1d, [training_rows(manifest, cache) for cache in holding])
    rows = readable_rows(manifest, rows) if views is None and pictures else rows
    rows = rows if plan.choose_rows is None else plan.choose_rows(manifest, rows)
    shapes = field_shapes(caches, plan.ensemble)

    def batches(feed: Feed) -> PairBatches:
        fields = TeacherFields(tuple(caches), wanted.fields, plan.ensemble, views, feed.live)
        pairs = PairBatches(manifest, rows, feed.inputs, feed.plan, teachers=fields, noise=feed.noise)
        if views is not None and pairs.num_views:
            say(f"pictures: one of {pairs.num_views} augmented views per step, as stored in {views.path}")
        return pairs

    return OpenedRows(Setting(shapes, manifest, rows), caches, batches, plan.ensemble)


# ----------------------------------------------------------------------------------------------------
# Questions


def _open_questions(plan: Questions, wanted: Wanted, name: str) -> OpenedRows:
    manifest = read_manifest(wanted.data)
    caches = find_by_field(wanted)
    rows = training_rows(manifest, None)
    views = same_data_cache(wanted.cache, manifest) if not caches else None
    for cache in caches or ([] if views is None else [views]):
        rows = np.intersect1d(rows, training_rows(manifest, cache))
    rows = rows[np.array([bool(task) for task in manifest.column("task")])[rows]]
    rows = rows if plan.choose_rows is None else plan.choose_rows(manifest, rows)
    if not len(rows):
        raise UserError(f"{manifest.data} has no training rows with a question: is its file named train...?")
    task = find_task(manifest, rows, plan.mode)
    check_words(plan, caches)
    labeled = labeled_rows(task, manifest, rows, regime=plan.regime, subset=plan.subset)
    report_labels(task, plan.regime, labeled)
    texts = [text for texts in manifest.table["texts"].take(rows).to_pylist() for text in texts]
    tokenizer = (plan.make_tokenizer or vocabulary_tokenizer)(texts)
    shapes = {name: field.shape for cache in caches for name, field in cache.fields.items()}
    keys = "".join(f"{key}\n" for key in manifest.table["key"].take(rows[labeled]).to_pylist())
    return OpenedRows(
        Setting(shapes, manifest, rows, task, tokenizer),
        caches,
        functools.partial(
            _question_batches, plan, wanted, Setting(shapes, manifest, rows, task, tokenizer), caches, labeled
        ),
        allows_live=False,
        facts={"task": dataclasses.asdict(task), "max_text": plan.max_text},
        files={"labelled.txt": keys, "tokenizer.json": tokenizer.to_str()},
    )


def _question_batches(
    plan: Questions,
    wanted: Wanted,
    setting: Setting,
    caches: list[Cache],
    labeled: np.ndarray,
    feed: Feed,
) -> QuestionBatches:
    """Return batches of the rows that the regime trains on. With semi:N, half of each batch has labels."""
    manifest, rows, task = setting.manifest, setting.rows, setting.task
    sources = [
        open_source(cache, manifest, rows, tuple(name for name in wanted.fields if name in cache.fields))
        for cache in caches
    ]
    score = clip_scorer(task, sources, manifest, rows, plan.teacher_logits)
    reader = QuestionReader(
        manifest, task, sources, feed.inputs, setting.tokenizer, plan.max_text, plan.words
    )
    order = question_order(plan, setting, labeled, feed.plan, caches[0].meta.block_rows if caches else 0)
    return QuestionBatches(reader, order, feed.plan, score=score, adapt=plan.adapt)


def question_order(
    plan: Questions, setting: Setting, labeled: np.ndarray, steps: StepPlan, block_rows: int
) -> QuestionOrder:
    """Return the order of the rows that the steps train on.

    Args:
        plan: Its regime selects the rows: labeled ones (full, low:N), all (zero), or half of each (semi:N).
        setting: Manifest and training rows.
        labeled: True for training rows whose label may be used, bool [rows].
        steps: Batch size, seed and ranks.
        block_rows: Rows of a cache block; 0 without a cache.

    Raises:
        UserError: The batch cannot be halved on every rank, or there are fewer rows than in a batch.
    """
    rows, num_rows = setting.rows, len(setting.manifest)
    block_rows = block_rows or num_rows
    kind, _ = parse_regime(plan.regime)
    halves = kind == "semi" and not plan.adapt
    if halves and steps.batch % (2 * steps.world):
        raise UserError(
            f"--batch-size {steps.batch}: with semi, half of the rows of each process have labels; choose "
            "an even number of rows per process"
        )
    usable = np.zeros(num_rows, bool)
    usable[rows[labeled]] = True
    size = steps.batch // 2 if halves else steps.batch
    first_rows = rows[labeled] if halves or kind in ("full", "low") else rows
    first = Order(first_rows, batch=size, seed=steps.seed, block_rows=block_rows)
    unlabeled = None
    if halves:
        unlabeled = Order(
            rows[~labeled], batch=size, seed=steps.seed, block_rows=block_rows, draws="unlabeled_order"
        )
    return QuestionOrder(first, unlabeled, usable)


def check_words(plan: Questions, caches: list[Cache]) -> None:
    """Raise a UserError if a recipe selects more words than a cache stores per text."""
    if plan.words is None:
        return
    for cache in caches:
        field = cache.fields.get(plan.words.index)
        if field is not None and plan.words.number > field.shape[0]:
            output = outputs_for(find_stored(cache.meta.spec.name), (plan.words.index,))[-1]
            raise UserError(
                f"{plan.words.number} selected words: {cache.path} has {field.shape[0]} of each text; build one with "
                f"more words in --outputs, as {output}:{plan.words.number}"
            )


def report_labels(task: Task, regime: str, labeled: np.ndarray) -> None:
    """Print the number of labels that are used; raise a UserError if a regime with labels has none."""
    title = f"{task.name} {task.which}".strip()
    say(
        f"{title}: {labeled.sum():,} of {len(labeled):,} training rows with labels ({regime}), "
        f"{task.classes} answers"
    )
    if not labeled.any() and not regime.startswith("zero"):
        raise UserError(f"--set regime={regime}: no training row has a label")


OPENERS: dict[type, Callable[[Any, Wanted, str], OpenedRows]] = {
    Pairs: _open_pairs,
    Texts: _open_texts,
    Questions: _open_questions,
}
