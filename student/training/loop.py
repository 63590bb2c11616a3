"""The loop of phase 2: prepare a run, take its steps, save and evaluate on the way."""

import contextlib
import itertools
import json
import shlex
import signal
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from student.contract import Capability, reason_against, require
from student.distributed import any_rank, mean_over_ranks
from student.inputs.loader import loader
from student.recipe import Progress, Recipe, Run
from student.training import checkpoint
from student.training.accumulate import accumulate, on_device
from student.training.best import Evaluate, keep_best
from student.training.engine import (
    clamp_scales,
    learning_rate,
    quiet_deepspeed,
    set_up_student,
    start_distributed,
    start_engine,
    take_optimizer_step,
)
from student.training.prepare import Prepared, prepare
from student.training.run_folder import open_run, run_record
from student.training.step import Loss, TrainStep
from student.training.telemetry.curve import draw_curve
from student.training.telemetry.metrics import plain, refuse_nan, refuse_nan_weights
from student.training.telemetry.reporting import Report, asked, reporting
from student.training.telemetry.speed import Speed, peak_memory
from teachercache.core.errors import UserError
from teachercache.core.paths import write_whole
from teachercache.core.process import keep_memory, rank, world_size
from teachercache.core.progress import say, ticker


class Trained(NamedTuple):
    """A run that has ended."""

    folder: Path
    prepared: Prepared


def train(
    recipe: Recipe[Any], run: Run, *, resume: bool, dry_run: bool = False, evaluate: Evaluate | None = None
) -> Trained:
    """Train a student; return it with its run folder.

    Args:
        recipe: What is trained.
        run: Where and how.
        resume: Go on from the last checkpoint of the run folder.
        dry_run: Take two steps, report time and memory, and leave nothing behind.
        evaluate: Run folder -> score, for `run.eval_every`.
    """
    out = Path(run.out)
    count_parts(recipe.batch, run.micro_batch)
    asked(run)

    # ---- the same start for everybody
    keep_memory()
    start_distributed(run.device)
    prepared = prepare(recipe, run)
    step_module = prepared.step.to(run.device)
    if run.eval_every and Capability.ANSWERS not in step_module.student.capabilities():
        require(step_module.student, Capability.ENCODES, "--eval-every")
    facts = run_record(recipe, run, prepared)
    if not dry_run:
        open_run(out, facts, resume)
        for name, text in prepared.files.items() if rank() == 0 else ():
            write_whole(out / name, text)
    rows = len(prepared.batches.rows)
    say(f"{recipe.name}: {count(step_module)}; {rows:,} rows, {recipe.steps} steps of {recipe.batch}")

    # ---- engine, and the checkpoint to go on from
    set_up_student(step_module.student, run)
    engine = start_engine(step_module, recipe.optim, run, recipe.batch // world_size())
    torch.manual_seed(run.seed * world_size() + rank())  # dropout differs between ranks
    speed = Speed(run, recipe.batch)
    if dry_run:
        rehearse(engine, prepared, recipe, speed)
        return Trained(out, prepared)
    last = checkpoint.last_checkpoint(out) if resume else None
    done = checkpoint.resume(engine, last) if last else 0
    if resume:
        say(f"going on from step {done}" if last else "there is no checkpoint yet: starting at step 0")

    # ---- steps, and a whole run behind them
    with reporting(run, facts, start=done) as report:
        step, stopping = run_steps(engine, prepared, recipe, speed, done, report, evaluate)
    if stopping:
        raise KeyboardInterrupt(
            f"stopped after step {step}; the same command with --resume --out {out} goes on"
        )
    checkpoint.save_student(step_module.student, out / "model.safetensors")
    if speed.steps and rank() == 0:
        write_whole(out / "speed.json", json.dumps(speed.facts()) + "\n")
        say(f"{out}: {speed.facts()['seconds_per_step']:.3f} s a step, {speed.words()}")
    return Trained(out, prepared)


def next_command(trained: Trained, recipe: Recipe[Any], run: Run) -> str:
    """Return a line with the command that a user runs next, by what the student can do."""
    folder, student, rows = str(trained.folder), trained.prepared.step.student, trained.prepared.rows
    offered = student.capabilities()
    if Capability.ANSWERS in offered and rows:
        words = ["student", "eval", folder, "--task", rows["task"]["name"], "--data", run.data]
    elif Capability.ENCODES in offered:
        words = ["student", "eval", folder, "--task", "retrieval", "--data", run.data]
    elif Capability.GENERATES in offered:
        words = ["student", "generate", folder, "--image", "FILE"]
    elif rows:  # it has no answers yet
        words = ["student", "train", "--recipe", recipe.name, "--data", run.data, "--set", f"init={folder}"]
    else:
        return f"trained {folder}{reason_against(student, Capability.ENCODES)}"
    return f"next: {shlex.join(words)}"


def run_steps(
    engine: Any,
    prepared: Prepared,
    recipe: Recipe[Any],
    speed: Speed,
    done: int,
    report: Report,
    evaluate: Evaluate | None,
) -> tuple[int, bool]:
    """Every step from `done` on, with checkpoints and evaluations; the steps done, and whether a signal ended them."""
    run, out = speed.run, Path(speed.run.out)
    step, stopping = done, False
    with catch_signals() as signals, ticker(recipe.steps - done, "steps", recipe.name) as tick:
        for step, values, terms in steps_from(engine, prepared, recipe, speed, done):
            refuse_nan(values["loss"], step - 1)
            report(step - 1, values)
            shown = "  ".join(f"{name} {values[name]:.4g}" for name in ("loss", *terms))
            tick.step(1, f"{shown}  {speed.words()}")
            stopping = any_rank(bool(signals))
            last = stopping or step == recipe.steps
            if evaluate and run.eval_every and (step % run.eval_every == 0 or step == recipe.steps):
                refuse_nan_weights(engine.module, step - 1)
                try:
                    keep_best(engine.module.student, out, step, evaluate)
                except Exception:
                    checkpoint.save(engine, out, step)
                    raise
            if last or step % run.save_every == 0:
                refuse_nan_weights(engine.module, step - 1)
                checkpoint.save(engine, out, step)
            if last:
                break
        else:
            return done, False  # there were no steps to take
    if rank() == 0 and not stopping:
        draw_curve(out, terms)
    return step, stopping


def steps_from(
    engine: Any, prepared: Prepared, recipe: Recipe[Any], speed: Speed, done: int
) -> Iterator[tuple[int, dict[str, float], tuple[str, ...]]]:
    """Take each step: how many are done with it, what it showed, and which of that are terms of the loss."""
    run = speed.run
    stream = loader(prepared.batches, start=done, workers=run.workers, micro=run.micro_batch)
    speed.wait()
    for step, parts in enumerate(batched(stream, count_parts(recipe.batch, run.micro_batch)), start=done):
        speed.compute()
        if not speed.steps:
            speed.count_products(
                engine, (on_device(part, run.device) for part in parts), Progress(step, recipe.steps)
            )
        for group in engine.optimizer.param_groups:
            group["lr"] = learning_rate(recipe.optim, step, recipe.steps)
        with quiet_deepspeed():
            loss, terms, notes = take_step(engine, parts, Progress(step, recipe.steps), run.device)
            clamp_scales(engine)
        values = plain(
            {"loss": mean_over_ranks(loss), **{k: mean_over_ranks(v) for k, v in terms.items()}, **notes}
        )
        speed.end_step()
        yield step + 1, values | {"lr": group["lr"]}, tuple(terms)
        speed.wait()


def rehearse(engine: Any, prepared: Prepared, recipe: Recipe[Any], speed: Speed) -> None:
    """Take two steps and print the time and memory that all of them need; the first one only warms up."""
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
        f"the first step took {first:.2f} s, another {later:.2f} s, {memory:.1f} GB at the peak; {recipe.steps} steps "
        f"take about {minutes:.1f} min; nothing was written"
    )


def count_parts(batch: int, micro: int) -> int:
    """Micro-batches that a rank's rows of a step make; UserError where they do not come out even."""
    share, left = divmod(batch, world_size())
    if left:
        raise UserError(f"--batch-size {batch} is not divisible by {world_size()} processes")
    if micro and (micro < 2 or share % micro):
        raise UserError(
            f"--micro-batch {micro} does not divide the {share} rows of a process: choose a divisor above 1"
        )
    return share // micro if micro else 1


def batched(stream: Iterable[dict[str, Tensor]], size: int) -> Iterator[list[dict[str, Tensor]]]:
    """`size` batches at a time."""
    batches = iter(stream)
    while parts := list(itertools.islice(batches, size)):
        yield parts


def take_step(engine: Any, parts: list[dict[str, Tensor]], progress: Progress, device: str) -> Loss:
    """Take one optimizer step over the micro-batches of a step."""
    if len(parts) > 1:
        return accumulate(engine, parts, progress, device)
    loss = Loss(*engine(on_device(parts[0], device), progress))
    engine.backward(loss.total)
    take_optimizer_step(engine)
    return loss


def count(step: TrainStep) -> str:
    """Parameters in words."""
    total = sum(parameter.numel() for parameter in step.student.parameters())
    heads = sum(parameter.numel() for parameter in step.heads.parameters()) if step.heads else 0
    return f"student of {total / 1e6:.1f}M parameters" + (f", heads {heads:,}" if heads else "")


@contextlib.contextmanager
def catch_signals() -> Iterator[list[int]]:
    """A list that SIGTERM and SIGINT put themselves into; the loop leaves after the step it is in."""
    received: list[int] = []
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        for number in before:
            signal.signal(number, lambda number, frame: received.append(number))
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
