"""What a run on a task's questions is made of: which rows have labels, the student's words, caches by field.

Not for pairs of pictures and texts: see `prepare`.
"""

import dataclasses
import shlex
from pathlib import Path
from typing import Any

import numpy as np
import torch

from student.inputs.caches import find_cache, open_source, parts_of, same_data_cache, training_rows
from student.inputs.clip_judge import find_judge
from student.inputs.order import Order
from student.inputs.question_batches import TaskBatches
from student.inputs.questions import Task, find_task, labelled_rows
from student.models.single_stream.loading import init_tokenizer
from student.models.single_stream.tokenizer import load_tokenizer, vocabulary_tokenizer
from student.recipe import Recipe, Run
from student.training.prepared import Prepared
from student.training.step import TrainStep
from teachercache.cache.store import Cache
from teachercache.core.errors import UserError
from teachercache.core.process import rank, world_size
from teachercache.core.progress import say
from teachercache.data.manifest import Manifest
from teachercache.data.read import read_manifest


def prepare_task(recipe: Recipe, run: Run) -> Prepared:
    """Questions, caches, student and step of a task recipe."""
    constants = recipe.constants
    if run.live:
        raise UserError(f"--live: {recipe.name} reads its teachers from caches alone; leave --live away")
    manifest = read_manifest(run.data)
    caches = find_task_caches(run, recipe.fields)
    rows = training_rows(manifest, None)
    looked = same_data_cache(run.cache, manifest) if not caches else None  # clip-tuned reads pictures instead
    for cache in caches or [one for one in [looked] if one]:
        rows = np.intersect1d(rows, training_rows(manifest, cache))
    rows = rows[np.array([bool(task) for task in manifest.column("task")])[rows]]
    if not len(rows):
        raise UserError(
            f"{manifest.data} has no training rows that ask something: is its file called train...?"
        )
    task = find_task(manifest, rows, constants.mode)
    check_words(constants, caches)
    known = labelled_rows(task, manifest, rows, constants.regime, constants.subset)
    say_labels(task, constants.regime, known)
    torch.manual_seed(run.seed)  # the same student and heads on every rank
    tokenizer = find_tokenizer(constants, manifest, rows)
    shapes = {name: field.shape for cache in caches for name, field in cache.fields.items()}
    student = recipe.build(constants, task, tokenizer, shapes)
    if getattr(student, "perturbation", None) and run.zero == 3:
        raise UserError("--set run.zero=3: VILLA's perturbations need whole parameters; choose 0, 1 or 2")
    heads = recipe.heads(constants, student, shapes) if recipe.heads else None
    sources = [
        open_source(cache, manifest, rows, tuple(name for name in recipe.fields if name in cache.fields))
        for cache in caches
    ]
    batches = make_batches(recipe, run, manifest, task, sources, caches, rows, known, tokenizer, student)
    keys = "".join(f"{key}\n" for key in manifest.table["key"].take(rows[known]).to_pylist())
    facts = {"task": dataclasses.asdict(task), "max_text": constants.max_text, **student.describe()}
    files = {"labelled.txt": keys, "tokenizer.json": tokenizer.to_str()}
    return Prepared(TrainStep(recipe, student, heads, precision=run.precision), batches, caches, facts, files)


def make_batches(
    recipe: Recipe,
    run: Run,
    manifest: Manifest,
    task: Task,
    sources: list[Any],
    caches: list[Cache],
    rows: np.ndarray,
    known: np.ndarray,
    tokenizer: Any,
    student: Any,
) -> TaskBatches:
    """Batches of the rows that the regime trains on; with semi, half of each has labels."""
    constants, block_rows = recipe.constants, caches[0].meta.block_rows if caches else len(manifest)
    kind, size = constants.regime.partition(":")[0], recipe.batch
    halves = kind == "semi" and constants.stage == "task"
    if halves and size % (2 * world_size()):
        raise UserError(
            f"--batch-size {size}: with semi half of each process's rows have labels; choose an even share"
        )
    order = Order(
        rows[known] if kind in ("full", "low") or halves else rows,
        batch=size // 2 if halves else size,
        seed=run.seed,
        block_rows=block_rows,
    )
    others = (
        Order(rows[~known], batch=size // 2, seed=run.seed + 1, block_rows=block_rows) if halves else None
    )
    labelled = np.zeros(len(manifest), bool)
    labelled[rows[known]] = True
    weighed = constants.w > 0 and constants.confidence and constants.stage == "task"
    judge = find_judge(task, sources, manifest, rows, asked=weighed)
    return TaskBatches(
        manifest,
        task,
        sources=sources,
        order=order,
        unlabelled=others,
        labelled=labelled,
        tokenizer=tokenizer,
        constants=constants,
        student=student,
        judge=judge,
        steps=recipe.steps,
        seed=run.seed,
        rank=rank(),
        world=world_size(),
    )


def find_task_caches(run: Run, reads: tuple[str, ...]) -> list[Cache]:
    """The cache of regions and the cache of CLIP, those that are read; each among the parts of --cache."""
    regions = tuple(name for name in reads if name.startswith("region_"))
    clip = tuple(name for name in reads if name not in regions)
    return [find_among(run, names) for names in (regions, clip) if names]


def find_among(run: Run, reads: tuple[str, ...]) -> Cache:
    """The first cache of those named that holds the fields; the `tc build` that makes one where none does."""
    parts = parts_of(run.cache)
    for i, part in enumerate(parts):
        try:
            return find_cache(part, reads, build_hint(run, reads, part))
        except UserError as error:
            if i == len(parts) - 1 or "several caches" in str(error):
                raise
    raise AssertionError("parts_of gives one part at least")


def check_words(constants: Any, caches: list[Cache]) -> None:
    """Refuse more words than a cache has of each text."""
    if constants.stage != "task":
        return
    kind = {"best": "word", "random": "random"}.get(constants.select, "")
    for cache in caches:
        found = cache.fields.get(f"{kind}_index")
        if found is not None and constants.w and constants.m > found.shape[0]:
            name = "tokens" if kind == "word" else "random_tokens"
            raise UserError(
                f"--set m={constants.m}: {cache.path} has {found.shape[0]} words of each text; build one "
                f"with --outputs embeddings,{name}:{constants.m}"
            )


def build_hint(run: Run, reads: tuple[str, ...], cache: str) -> str:
    """A `tc build` that makes what is missing."""
    regions = reads[0].startswith("region_")
    name = "regions-lite" if regions else "clip-lite"
    tokens = any(name.startswith("word_") for name in reads)
    random = any(name.startswith("random_") for name in reads)
    outputs = (
        []
        if regions
        else [
            "--outputs",
            ",".join(["embeddings", *(["tokens"] if tokens else []), *(["random_tokens"] if random else [])]),
        ]
    )
    path = Path(cache)
    out = path if path.suffix == ".zarr" else path / f"{name}.zarr"
    return shlex.join(["tc", "build", "--teacher", name, *outputs, "--data", run.data, "--out", str(out)])


def say_labels(task: Task, regime: str, known: np.ndarray) -> None:
    """How many labels are used."""
    what = f"{task.name} {task.which}".strip()
    say(
        f"{what}: {known.sum():,} of {len(known):,} training rows with labels ({regime}), {task.classes} answers"
    )
    if not known.any() and not regime.startswith("zero"):
        raise UserError(f"--set regime={regime}: no training row has a label")


def find_tokenizer(constants: Any, manifest: Manifest, rows: np.ndarray) -> Any:
    """The one that is named, else that of `init`, else the words of the training rows."""
    if constants.tokenizer:
        return load_tokenizer(Path(constants.tokenizer))
    own = constants.init and not constants.model.startswith("clip-")  # those have CLIP's
    return init_tokenizer(constants.init) if own else vocabulary_tokenizer(texts_of(manifest, rows))


def texts_of(manifest: Manifest, rows: np.ndarray) -> list[str]:
    """Every text of the rows, which a vocabulary is made of; a task's texts are no secret, its labels are."""
    return [text for texts in manifest.table["texts"].take(rows).to_pylist() for text in texts]
