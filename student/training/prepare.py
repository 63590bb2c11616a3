"""Prepare a run: open rows and caches, build student, heads and batches, and run all checks."""

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

import torch

from student.contract import Capability, StudentSpec, require
from student.inputs.hints import Wanted
from student.inputs.loader import Batches
from student.inputs.open_rows import Feed, OpenedRows, open_rows
from student.inputs.order import StepPlan
from student.models.registry import find_family
from student.recipe import Recipe, Run
from student.training.batch_norm import set_up_batch_norm
from student.training.step import TrainStep
from teachercache.cache.store import Cache
from teachercache.core.errors import UserError, calling
from teachercache.core.process import rank, world_size
from teachercache.core.progress import say, status
from teachercache.teachers.of_cache import load_teacher
from teachercache.teachers.teacher import Teacher


@dataclasses.dataclass(frozen=True)
class Prepared:
    """The parts of a run before its first step.

    Args:
        step: Student, heads and loss, to be wrapped by DeepSpeed.
        batches: The batches of the run.
        caches: The caches of the run, one for each teacher or group of fields.
        student: The description from which the student is rebuilt.
        rows: JSON for run.json, from which rows of the same kind can be read again.
        files: Contents of further text files in the run folder, by file name.
    """

    step: TrainStep
    batches: Batches
    caches: list[Cache]
    student: StudentSpec
    rows: Mapping[str, Any]
    files: Mapping[str, str]


def prepare(recipe: Recipe[Any], run: Run) -> Prepared:
    """Open rows and caches, build student, heads and batches, and run all checks.

    Raises:
        UserError: The run cannot be trained; the message names the command or option that fixes it.
    """
    constants, fields = recipe.constants, recipe.fields
    wanted = Wanted(run.cache, run.data, fields, recipe.teacher, recipe.teacher_outputs)
    with calling(f"recipe {recipe.name}: rows", recipe.rows):
        rows = recipe.rows(constants)
    opened = open_rows(rows, wanted, name=recipe.name)
    warn_of_random_teachers(opened.caches)
    torch.manual_seed(run.seed)  # so that student and heads are equal on all ranks
    with status("building the student"), calling(f"recipe {recipe.name}: student", recipe.student):
        student = recipe.student(constants, opened.setting)
    check_spec(student.spec)
    if run.zero == 3:
        require(student, Capability.SHARDS_PARAMETERS, "--set run.zero=3")
    shapes = opened.setting.shapes
    missing = [name for name in student.row_inputs.fields if name not in fields]
    if missing:
        raise UserError(
            f"{recipe.name}: the student reads the fields {', '.join(missing)}, which are missing in the "
            "recipe's teacher_fields"
        )
    with calling(f"recipe {recipe.name}: distill_heads", recipe.distill_heads):
        heads = recipe.distill_heads(constants, student, shapes)
    # Teachers are loaded after student and heads, because loading draws random numbers
    gradient_teacher = load_gradient_teacher(recipe, run, opened.caches)
    online = load_online_teacher(recipe, run, opened) if run.online_teacher else None
    plan = StepPlan(recipe.batch, recipe.steps, run.seed, rank(), world_size())
    with calling(f"recipe {recipe.name}: sample_noise", recipe.sample_noise):
        noise = recipe.sample_noise(constants, shapes)
    batches = opened.batches(Feed(student.row_inputs, plan, noise, online))
    step = TrainStep(
        recipe,
        student,
        heads,
        online_teacher=online,
        gradient_teacher=gradient_teacher,
        precision=run.precision,
    )
    refuse_scalar_parameters(step)
    set_up_batch_norm(
        step,
        micro_batches=0 < run.micro_batch < recipe.batch // world_size(),
        ranks=world_size(),
        device=run.device,
    )
    files = {**student.spec.files, **opened.files}
    return Prepared(step, batches, opened.caches, student.spec, opened.facts, files)


def check_spec(spec: StudentSpec) -> None:
    """Check that run.json can hold the description of a student, and say if the student cannot be loaded from it.

    Raises:
        UserError: An entry of its config is not of a JSON type.
    """
    for key, value in spec.config.items():
        try:
            json.dumps(value)
        except (TypeError, ValueError) as error:
            raise UserError(
                f"the student of the family {spec.family}: config['{key}'] is a {type(value).__name__}: "
                "run.json holds JSON types alone"
            ) from error
    try:
        find_family(spec.family)
    except UserError as error:
        say(f"WARNING: the run trains, but student eval and export will not load it: {error}")


def refuse_scalar_parameters(step: TrainStep) -> None:
    """Raise a UserError for a parameter without dimensions, which DeepSpeed cannot hold."""
    for name, parameter in step.named_parameters():
        if not parameter.ndim:
            raise UserError(
                f"{step.recipe.name}: the parameter {name} has no dimensions: give it one, as in "
                "nn.Parameter(torch.full((1,), 0.5))"
            )


def warn_of_random_teachers(caches: list[Cache]) -> None:
    """Print a warning for each cache of a teacher with random weights."""
    for cache in caches:
        if cache.meta.spec.weights.startswith("random:"):
            say(f"WARNING: the teacher of {cache.path} has random weights; there is nothing in it to distill")


def load_gradient_teacher(recipe: Recipe[Any], run: Run, caches: list[Cache]) -> Teacher | None:
    """Load the teacher that needs backpropagation, or return None if the recipe has none."""
    if recipe.gradient_teacher is None:
        return None
    if run.online_teacher:
        raise UserError(
            f"--live: {recipe.name} already loads the part of its teacher that needs gradients, and reads "
            "the rest from the cache; drop --live"
        )
    return recipe.gradient_teacher.load(caches[0], recipe.constants, run.device) if caches else None


def load_online_teacher(recipe: Recipe[Any], run: Run, opened: OpenedRows) -> Teacher:
    """Load the teacher of the cache, to compute its fields in every step."""
    caches = opened.caches
    if not opened.allows_live:
        raise UserError(f"--live: {recipe.name} supports cached teachers only; drop --live")
    if not caches:
        raise UserError("--live: this recipe reads no teacher field; drop --live")
    if len(caches) > 1:
        raise UserError("--live runs one teacher: pass one --cache, or drop --live")
    teacher = load_teacher(caches[0])
    teacher.module.to(run.device)
    return teacher
