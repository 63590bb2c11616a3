"""Train a student: prepare the run, take its steps, save checkpoints and evaluate in between."""

import dataclasses
import itertools
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from student.contract import Capability, require
from student.distributed import any_rank, from_all_ranks, mean_over_ranks, on_first_rank
from student.inputs.loader import loader
from student.recipe import Progress, Recipe, Run
from student.training import checkpoint
from student.training.accumulate import accumulate, on_device
from student.training.best import Evaluate, is_evaluated, keep_best
from student.training.engine import (
    clamp_scales,
    learning_rate,
    quiet_deepspeed,
    set_up_student,
    start_distributed,
    start_engine,
    take_optimizer_step,
    unchanged_process,
)
from student.training.lock import only_trainer
from student.training.pauses import Pauses
from student.training.prepare import Prepared, prepare
from student.training.run_folder import new_folder, open_run, refuse_folder, run_record
from student.training.step import Engine, Loss, TrainStep
from student.training.telemetry.curve import draw_curve
from student.training.telemetry.metrics import plain, read_metrics, refuse_nan, refuse_nan_weights, terms_of
from student.training.telemetry.reporting import Report, reporting, requested_sinks
from student.training.telemetry.speed import Speed, peak_memory
from teachercache.core.digests import write_proved
from teachercache.core.errors import UserError, is_machine
from teachercache.core.paths import is_url
from teachercache.core.process import keep_memory, rank, terminable, world_size
from teachercache.core.progress import say, ticker
from teachercache.data.manifest import Manifest


class Trained(NamedTuple):
    """A finished run."""

    folder: Path
    prepared: Prepared


def train(
    recipe: Recipe[Any],
    run: Run,
    *,
    resume: bool,
    dry_run: bool = False,
    evaluate: Evaluate | None = None,
    new_name: bool = False,
) -> Trained:
    """Train a student.

    Args:
        recipe: The recipe to train.
        run: Data, output folder and device.
        resume: Resume from the last checkpoint of the run folder.
        dry_run: Take two steps and print time and memory, without writing a run folder.
        evaluate: Scores a run folder every `run.eval_every` steps.
        new_name: Add a number to the name of the run folder if it exists.

    Returns:
        The run folder and the prepared run with its trained student.

    Raises:
        UserError: The run cannot be trained, or its loss is not finite.
        KeyboardInterrupt: The run was stopped by a signal, after a checkpoint; Terminated for SIGTERM and SIGHUP.
    """
    with terminable(), unchanged_process():
        refuse_folder(run.out, resume=resume and not dry_run)
        count_micro_batches(recipe.batch, run.micro_batch)
        requested_sinks(run)
        keep_memory()
        start_distributed(run.device)

        # ---- prepare the run; every rank does the same
        prepared = prepare(recipe, run)
        step_module = prepared.step.to(run.device)
        if run.eval_every and Capability.ANSWERS not in step_module.student.capabilities():
            require(step_module.student, Capability.ENCODES, "--eval-every")
        if dry_run:
            rehearse(engine_of(recipe, run, prepared), prepared, recipe, Speed(run, recipe.batch))
            return Trained(Path(run.out), prepared)
        if new_name:
            folders: list[Path] = []
            on_first_rank(lambda: folders.append(new_folder(Path(run.out))))
            run = dataclasses.replace(run, out=str(from_all_ranks(folders)[0][0]))

        # ---- open the folder, take the steps and save the student
        out, facts = Path(run.out), run_record(recipe, run, prepared)
        with only_trainer(out):
            on_first_rank(lambda: open_run(out, facts, prepared.files, resume=resume))
            _train_in(recipe, run, prepared, facts, resume=resume, evaluate=evaluate)
        return Trained(out, prepared)


def _train_in(
    recipe: Recipe[Any],
    run: Run,
    prepared: Prepared,
    facts: dict[str, Any],
    *,
    resume: bool,
    evaluate: Evaluate | None,
) -> None:
    """Take the steps of a run in its open folder, and save the student."""
    out = Path(run.out)
    engine = engine_of(recipe, run, prepared)
    speed = Speed(run, recipe.batch)
    with quiet_deepspeed():
        last = checkpoint.resume_newest(engine, out) if resume else None
    on_first_rank(lambda: checkpoint.remove_old(out, run.keep))  # a kill may have left one more
    done = last or 0
    if resume:
        found = last is not None
        say(f"resuming from step {done}" if found else "there is no checkpoint yet: starting at step 0")
    pauses = Pauses(run, recipe.steps)
    with reporting(run, facts, start=done) as report:
        step, stopping = run_steps(engine, prepared, recipe, speed, done, report, evaluate, pauses)
    if stopping:
        raise pauses.stop_error(step, out)
    with quiet_deepspeed():
        checkpoint.save_student(prepared.step.student, out)
    if speed.steps and rank() == 0:
        write_proved(out / "speed.json", out, json.dumps(speed.facts()) + "\n")
        say(f"{out}: {speed.facts()['seconds_per_step']:.3f} s per step, {speed.summary()}")


def engine_of(recipe: Recipe[Any], run: Run, prepared: Prepared) -> Engine:
    """Print the sizes of a run, and return its engine with the random state of the first step."""
    step_module = prepared.step
    rows, sizes = len(prepared.batches.rows), parameter_counts(step_module)
    say(f"{recipe.name}: {sizes}; {rows:,} rows, {recipe.steps} steps of {recipe.batch}")
    set_up_student(step_module.student, run)
    engine = start_engine(step_module, recipe.optim, run, recipe.batch // world_size())
    torch.manual_seed(run.seed * world_size() + rank())  # so that dropout differs between ranks
    return engine


def next_command(trained: Trained, recipe: Recipe[Any], run: Run) -> tuple[str, ...]:
    """Return the command to type next, depending on the student's capabilities."""
    folder, student, rows = str(trained.folder), trained.prepared.step.student, trained.prepared.rows
    capabilities = student.capabilities()
    if Capability.ANSWERS in capabilities and rows:
        return "student", "eval", folder, "--task", rows["task"]["name"], "--data", run.data
    if Capability.ENCODES in capabilities:
        return "student", "eval", folder, "--task", "retrieval", "--data", run.data
    picture = first_picture(trained.prepared.batches.manifest)
    if Capability.GENERATES in capabilities and picture:
        return "student", "generate", folder, "--image", picture
    if rows:  # adapted, but not yet trained on answers
        return "student", "train", "--recipe", recipe.name, "--data", run.data, "--set", f"init={folder}"
    return "student", "verify", folder


def first_picture(manifest: Manifest) -> str:
    """Return the path of a picture of the data that is a local file, or "" if none of the first rows has one."""
    for row in range(min(len(manifest), 100)):
        image = manifest.row(row).image
        if image and not is_url(manifest.root) and (manifest.root / image).is_file():
            return str(manifest.root / image)
    return ""


def run_steps(
    engine: Engine,
    prepared: Prepared,
    recipe: Recipe[Any],
    speed: Speed,
    done: int,
    report: Report,
    evaluate: Evaluate | None,
    pauses: Pauses,
) -> tuple[int, bool]:
    """Take all steps from `done` on, with checkpoints and evaluations.

    Args:
        engine: The engine of the run.
        prepared: Rows, caches and student.
        recipe: The recipe that is trained.
        speed: Measures the steps.
        done: Number of steps already taken.
        report: Logs the values of a step.
        evaluate: Scores a run folder, or None.
        pauses: Decides when the run saves and stops.

    Returns:
        The number of steps taken in total, and whether a signal stopped the run.
    """
    run, out = speed.run, Path(speed.run.out)
    step, stopping = done, False
    if evaluate and done and is_evaluation(done, run, recipe) and not any_rank(is_evaluated(out, done)):
        keep_best(engine.module.student, out, done, evaluate)  # it failed before the checkpoint was saved
    if done == recipe.steps and any_rank(not (out / "curve.png").exists()):
        draw(out, terms_of(read_metrics(out / "metrics.jsonl")))
    with pauses.catching(), ticker(recipe.steps - done, "steps", recipe.name) as tick:
        for step, values, terms in steps_from(engine, prepared, recipe, speed, done):
            refuse_nan(values["loss"], step - 1)
            report(step - 1, values)
            shown = "  ".join(f"{name} {values[name]:.4g}" for name in ("loss", *terms))
            tick.step(1, f"{shown}  {speed.summary()}")
            saving, stopping = pauses.after(step)
            if evaluate and is_evaluation(step, run, recipe):
                refuse_nan_weights(engine.module, step - 1)
                try:
                    keep_best(engine.module.student, out, step, evaluate)
                except Exception:
                    save_checkpoint(engine, run, step)
                    raise
            if step == recipe.steps:
                draw(out, terms)  # before the last checkpoint, after which nothing is left to resume
            if saving:
                refuse_nan_weights(engine.module, step - 1)
                save_checkpoint(engine, run, step)
                pauses.have_saved()
            if stopping or step == recipe.steps:
                break
        else:
            return done, False  # no steps were left
    return step, stopping


def save_checkpoint(engine: Engine, run: Run, step: int) -> None:
    """Save a checkpoint, and remove all but the newest `run.keep`."""
    out = Path(run.out)
    with quiet_deepspeed():
        checkpoint.save(engine, out, step)
    on_first_rank(lambda: checkpoint.remove_old(out, run.keep))


def draw(out: Path, terms: tuple[str, ...]) -> None:
    """Draw the curve of a run on rank 0; only an error of the machine stops the run, which a resume continues."""

    def write() -> None:
        try:
            draw_curve(out, terms)
        except Exception as error:
            if is_machine(error):
                raise
            say(f"WARNING: {out / 'curve.png'} was not drawn: {error}")

    on_first_rank(write)


def is_evaluation(step: int, run: Run, recipe: Recipe[Any]) -> bool:
    """Return whether the student is evaluated after a step."""
    return run.eval_every > 0 and (step % run.eval_every == 0 or step == recipe.steps)


def steps_from(
    engine: Engine, prepared: Prepared, recipe: Recipe[Any], speed: Speed, done: int
) -> Iterator[tuple[int, dict[str, float], tuple[str, ...]]]:
    """Take the steps from `done` on.

    Yields:
        After each step: the number of steps taken in total, the values to log, and the names of the loss
        terms.
    """
    run = speed.run
    stream = loader(prepared.batches, start=done, workers=run.workers, micro=run.micro_batch)
    speed.wait()
    size = count_micro_batches(recipe.batch, run.micro_batch)
    for step, micro_batches in enumerate(batched(stream, size), start=done):
        speed.compute()
        if not speed.steps:
            speed.count_products(
                engine,
                (on_device(micro_batch, run.device) for micro_batch in micro_batches),
                Progress(step, recipe.steps),
            )
        rate = learning_rate(recipe.optim, step, recipe.steps)
        for group in engine.optimizer.param_groups:
            group["lr"] = rate
        with quiet_deepspeed():
            loss, terms, notes = take_step(engine, micro_batches, Progress(step, recipe.steps), run.device)
            clamp_scales(engine)
        values = plain(
            {"loss": mean_over_ranks(loss), **{k: mean_over_ranks(v) for k, v in terms.items()}, **notes}
        )
        speed.end_step()
        yield step + 1, values | {"lr": rate}, tuple(terms)
        speed.wait()


def rehearse(engine: Engine, prepared: Prepared, recipe: Recipe[Any], speed: Speed) -> None:
    """Take two steps, and print the time and memory that the whole run needs. The first step warms up."""
    teacher, rows = prepared.step.gradient_teacher, speed.run.micro_batch or recipe.batch // world_size()
    if teacher is not None and recipe.gradient_teacher is not None:
        say(recipe.gradient_teacher.memory(teacher, rows, recipe.constants))
    seconds = [0.0]
    for _, values, _ in itertools.islice(steps_from(engine, prepared, recipe, speed, 0), 2):
        refuse_nan(values["loss"], 0)
        seconds.append(speed.waited + speed.computed)
    first, later = seconds[1], seconds[-1] - seconds[-2]
    minutes = (first + later * (recipe.steps - 1)) / 60
    memory = peak_memory(speed.run.device) / 1e9
    say(
        f"the first step took {first:.2f} s, the second {later:.2f} s, {memory:.1f} GB at the peak; "
        f"{recipe.steps} steps take about {minutes:.1f} min; nothing was written"
    )


def count_micro_batches(batch: int, micro: int) -> int:
    """Return the number of micro-batches per step and rank; raise a UserError for an uneven division."""
    share, remainder = divmod(batch, world_size())
    if remainder:
        raise UserError(f"--batch-size {batch} is not divisible by {world_size()} processes")
    if micro and (micro < 2 or share % micro):
        raise UserError(
            f"--micro-batch {micro} does not divide the {share} rows of a process: choose a divisor above 1"
        )
    return share // micro if micro else 1


def batched(stream: Iterable[dict[str, Tensor]], size: int) -> Iterator[list[dict[str, Tensor]]]:
    """Yield lists of `size` consecutive batches."""
    batches = iter(stream)
    while micro_batches := list(itertools.islice(batches, size)):
        yield micro_batches


def take_step(
    engine: Engine, micro_batches: list[dict[str, Tensor]], progress: Progress, device: str
) -> Loss:
    """Take one optimizer step over the micro-batches of a step, and return the loss."""
    if len(micro_batches) > 1:
        return accumulate(engine, micro_batches, progress, device)
    loss = Loss(*engine(on_device(micro_batches[0], device), progress))
    engine.backward(loss.total)
    take_optimizer_step(engine)
    return loss


def parameter_counts(step: TrainStep) -> str:
    """Return a summary of the number of parameters of student and heads."""
    total = sum(parameter.numel() for parameter in step.student.parameters())
    heads = sum(parameter.numel() for parameter in step.heads.parameters()) if step.heads else 0
    return f"student of {total / 1e6:.1f}M parameters" + (f", heads {heads:,}" if heads else "")
