"""What a run is made of before its first step: data, caches, student, batches, and every check that can fail by then.

Not for steps: see `train`.
"""

import functools
import shlex
from pathlib import Path
from typing import Any

import numpy as np
import torch

from student.ensemble import check_ensemble
from student.inputs.caches import field_shapes, find_caches, readable_rows, same_data_cache, training_rows
from student.inputs.pairs import Batches
from student.recipe import Recipe, Run
from student.training.prepare_questions import prepare_task
from student.training.prepared import Prepared
from student.training.step import TrainStep
from teachercache.cache.store import Cache
from teachercache.core.errors import UserError
from teachercache.core.process import rank, world_size
from teachercache.core.progress import say
from teachercache.data.read import read_manifest


def prepare(recipe: Recipe, run: Run) -> Prepared:
    """Data, cache, student and step; every check that can fail before the first step."""
    if recipe.questions:
        return prepare_task(recipe, run)
    manifest = read_manifest(run.data)
    torch.manual_seed(run.seed)  # the same student and heads on every rank
    student = recipe.build(recipe.constants)
    reads = tuple(
        dict.fromkeys((*recipe.fields, *(name for name in student.inputs if name not in ("image", "text"))))
    )
    caches = find_caches(run.cache, reads, functools.partial(build_hint, run, reads, recipe.teacher))
    ensemble = teachers_of(recipe, caches)
    cache, *more = caches or [None]
    looked = cache or same_data_cache(run.cache, manifest)  # whoever built it has read every picture
    rows = functools.reduce(np.intersect1d, [training_rows(manifest, one) for one in caches or [looked]])
    rows = readable_rows(manifest, rows) if looked is None else rows
    rows = student.choose_rows(manifest, rows) if hasattr(student, "choose_rows") else rows
    shapes = field_shapes(caches, ensemble)
    heads = recipe.heads(recipe.constants, student, shapes) if recipe.heads else None
    teacher = passed_teacher(recipe, caches, run)
    live = live_teacher(caches, run.device) if run.live else None  # teachers last: they draw random numbers
    draw = functools.partial(recipe.draw, constants=recipe.constants, shapes=shapes) if recipe.draw else None
    batches = Batches(
        manifest,
        rows,
        student=student,
        cache=cache,
        more=more,
        ensemble=ensemble,
        reads=reads,
        batch=recipe.batch,
        steps=recipe.steps,
        seed=run.seed,
        live=live,
        draw=draw,
        views=looked,
        rank=rank(),
        world=world_size(),
    )
    if looked is not None and batches.num_views:
        say(f"pictures: one of {batches.num_views} augmented views a step, as stored in {looked.path}")
    step = TrainStep(recipe, student, heads, live, teacher=teacher, precision=run.precision)
    described = (student.describe(), student.files()) if hasattr(student, "describe") else (None, None)
    return Prepared(step, batches, caches, *described)


def teachers_of(recipe: Recipe, caches: list[Cache]) -> str:
    """How the recipe joins several teachers; what is said about those that there are."""
    for cache in caches:
        if cache.meta.spec.weights.startswith("random:"):
            say(f"WARNING: the teacher of {cache.path} has random weights; there is nothing in it to distil")
    ensemble = getattr(recipe.constants, "ensemble", "")
    if len(caches) > 1 and not ensemble:
        raise UserError(f"{recipe.name} reads one cache, not {len(caches)}: pass one as --cache")
    if ensemble:
        check_ensemble(ensemble)
    if len(caches) > 1:
        say(f"{len(caches)} teachers, {ensemble}: {', '.join(cache.meta.spec.name for cache in caches)}")
    return ensemble


def build_hint(run: Run, reads: tuple[str, ...], teacher: str, cache: str) -> str:
    """A `tc build` that makes the cache which this run looks for."""
    path = Path(cache)
    out = path if path.suffix == ".zarr" else path / f"{teacher}.zarr"
    layers = sorted({int(name.rpartition("_")[2]) for name in reads if "_hidden_" in name})
    more = [f"hidden:{'+'.join(map(str, layers))}"] if layers else []
    more += ["patches"] if "patch_emb" in reads else []
    outputs = ["--outputs", ",".join(["embeddings", *more])] if more else []
    outputs = (
        ["--outputs", "text_states,latents,unet_features:100+out"] if "unet_feature" in reads else outputs
    )
    return shlex.join(["tc", "build", "--teacher", teacher, *outputs, "--data", run.data, "--out", str(out)])


def passed_teacher(recipe: Recipe, caches: list[Cache], run: Run) -> Any:
    """The teacher that the gradient passes through, on the device; None where recipe or constants have none."""
    if recipe.live is None:
        return None
    if run.live:
        raise UserError(
            f"--live: {recipe.name} loads what it needs of its teacher by itself and reads the rest from "
            "the cache; leave --live away"
        )
    return recipe.live.load(caches[0], recipe.constants, run.device) if caches else None


def live_teacher(caches: list[Cache], device: str) -> Any:
    """The cache's teacher in this process."""
    from teachercache.teachers.of_cache import load_teacher

    if not caches:
        raise UserError("--live: this recipe reads nothing from a teacher; leave --live away")
    if len(caches) > 1:
        raise UserError("--live runs one teacher: pass one --cache, or leave --live away")
    teacher = load_teacher(caches[0])
    teacher.module.to(device)
    return teacher
