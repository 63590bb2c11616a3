"""THE phase-2 loop. Not for choosing what is computed: that is the recipe."""

import dataclasses
import importlib.metadata
import json
import signal
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from student import checkpoint
from student.batches import Batches, find_cache, loader, readable_rows, same_data_cache, training_rows
from student.distributed import mean_over_ranks
from student.engine import clamp_scales, learning_rate, quiet_deepspeed, start_distributed, start_engine
from student.metrics import Metrics, plain, refuse_nan
from student.recipe import Now, Recipe, Run
from student.step import TrainStep
from teachercache.names import UserError
from teachercache.readers import read_manifest
from teachercache.runtime import keep_memory, rank, say, ticker, world_size
from teachercache.spec import fingerprint, to_dict
from teachercache.store import Cache, write_atomic


class Prepared(NamedTuple):
    """Everything that a run is made of, before its first step."""

    step: TrainStep
    batches: Batches
    cache: Cache | None


def train(recipe: Recipe, run: Run, *, resume: bool, dry_run: bool = False) -> Path:
    """Train a student; returns the run folder. With `dry_run` one step is taken and nothing is left behind."""
    out = Path(run.out)
    if recipe.batch % world_size():
        raise UserError(f"--batch-size {recipe.batch} is not divisible by {world_size()} processes")

    # ---- the same start for everybody
    keep_memory()
    start_distributed(run.device)
    prepared = prepare(recipe, run)
    facts = describe(recipe, run, prepared.cache)
    if not dry_run:
        open_run(out, facts, resume)
    rows = len(prepared.batches.rows)
    say(f"{recipe.name}: {count(prepared.step)}; {rows:,} rows, {recipe.steps} steps of {recipe.batch}")

    # ---- engine, and the checkpoint to go on from
    engine = start_engine(prepared.step.to(run.device), recipe.optim, run, recipe.batch // world_size())
    last = checkpoint.last_checkpoint(out) if resume else None
    torch.manual_seed(run.seed * world_size() + rank())  # dropout differs between ranks
    done = checkpoint.resume(engine, last) if last else 0
    if last:
        say(f"going on from step {done}")
    metrics = None if dry_run else Metrics(out / "metrics.jsonl", start=done)
    stop = catch_signals()

    # ---- steps
    steps = done + 1 if dry_run else recipe.steps
    begin, waited, seen = time.monotonic(), 0.0, 0
    with ticker(steps - done, "steps", recipe.name) as tick:
        waiting = time.monotonic()
        for step, batch in enumerate(loader(prepared.batches, start=done, workers=run.workers), start=done):
            waited += time.monotonic() - waiting
            for group in engine.optimizer.param_groups:
                group["lr"] = learning_rate(recipe.optim, step, recipe.steps)
            batch = {name: value.to(run.device, non_blocking=True) for name, value in batch.items()}
            with quiet_deepspeed():
                loss, terms, notes = engine(batch, Now(step, recipe.steps))
                engine.backward(loss)
                engine.step()
            clamp_scales(engine)
            seen += 1
            values = plain(
                {
                    "loss": mean_over_ranks(loss.detach()),
                    **{k: mean_over_ranks(v.detach()) for k, v in terms.items()},
                }
            )
            refuse_nan(values["loss"], step)
            if metrics is not None:
                metrics.write({"step": step, **values, "lr": group["lr"], **plain(notes)})
            tick.step(1, "  ".join(f"{name} {value:.4f}" for name, value in values.items()))
            if step + 1 == steps or stop:
                break
            if (step + 1) % run.save_every == 0:
                checkpoint.save(engine, out, step + 1)
            waiting = time.monotonic()

    # ---- leave the run whole
    elapsed = time.monotonic() - begin
    speed = {"seconds_per_step": elapsed / max(seen, 1), "samples_per_second": seen * recipe.batch / elapsed,
             "data_wait": waited / elapsed}  # fmt: skip
    if dry_run:
        minutes = elapsed * recipe.steps / 60
        say(f"one step took {elapsed:.2f} s; {recipe.steps} steps take about {minutes:.1f} min; nothing was written")
        return out
    if seen:
        checkpoint.save(engine, out, step + 1)
    if stop:
        say(f"stopped after step {step + 1}; the same command with --resume --out {out} goes on")
        raise KeyboardInterrupt
    checkpoint.save_student(prepared.step.student, out / "model.safetensors")
    if rank() == 0 and seen:
        write_atomic(out / "speed.json", json.dumps(speed) + "\n")
    say(f"{out}: {speed['seconds_per_step']:.3f} s a step, {speed['samples_per_second']:.0f} samples/s, "
        f"{100 * speed['data_wait']:.0f} % of the time waiting for data")  # fmt: skip
    return out


def prepare(recipe: Recipe, run: Run) -> Prepared:
    """Data, cache, student and step; every check that can fail before the first step."""
    manifest = read_manifest(run.data)
    torch.manual_seed(run.seed)  # the same student and heads on every rank
    student = recipe.build(recipe.constants)
    reads = tuple(dict.fromkeys((*recipe.reads, *(name for name in student.inputs if name not in ("image", "text")))))
    cache = find_cache(run.cache, reads, f"tc build --teacher clip-lite --data {run.data}") if reads else None
    if cache is not None and cache.meta.spec.weights.startswith("random:"):
        say(f"WARNING: the teacher of {cache.path} has random weights; there is nothing in it to distil")
    rows = training_rows(manifest, cache or same_data_cache(run.cache, manifest))
    if cache is None and same_data_cache(run.cache, manifest) is None:
        rows = readable_rows(manifest, rows)
    live = live_teacher(cache) if run.live else None
    shapes = {} if cache is None else {name: field.shape for name, field in cache.fields.items()}
    heads = recipe.heads(recipe.constants, student, shapes) if recipe.heads else None
    batches = Batches(manifest, rows, student=student, cache=cache, reads=reads, batch=recipe.batch,
                      steps=recipe.steps, seed=run.seed, live=live, rank=rank(), world=world_size())  # fmt: skip
    return Prepared(TrainStep(recipe, student, heads, live), batches, cache)


def live_teacher(cache: Cache | None) -> Any:
    """The cache's teacher in this process."""
    from teachercache.live import load_teacher

    if cache is None:
        raise UserError("--live: this recipe reads nothing from a teacher; leave --live away")
    return load_teacher(cache)


def describe(recipe: Recipe, run: Run, cache: Cache | None) -> dict[str, Any]:
    """What run.json holds: enough to run it again, and to refuse a resume of something else."""
    names = ("name", "paper", "reads", "steps", "batch")
    known = {name: getattr(recipe, name) for name in names}
    known |= {"constants": dataclasses.asdict(recipe.constants), "optim": dataclasses.asdict(recipe.optim)}
    versions = {name: importlib.metadata.version(name) for name in ("torch", "open_clip_torch", "deepspeed")}
    return json.loads(json.dumps({
        "recipe": known,
        "run": dataclasses.asdict(run),
        "world_size": world_size(),
        "teacher": to_dict(cache.meta.spec) if cache else None,
        "cache": fingerprint(cache.meta) if cache else None,
        "versions": versions,
    }))  # fmt: skip


def open_run(out: Path, facts: dict[str, Any], resume: bool) -> None:
    """Write run.json, or compare with the one that is there; a different run is refused by what changed."""
    path = out / "run.json"
    exists = path.exists()
    dist.barrier()  # every rank has looked before rank 0 writes
    if exists:
        if not resume:
            raise UserError(f"{out} exists: go on with --resume, or pass another --out")
        then = json.loads(path.read_text())
        changed = [f"{a}: {then[a]} there, {facts[a]} asked" for a in ("cache",) if then[a] != facts[a]]
        for group, ignored in (
            ("recipe", ()),
            ("run", ("cache", "workers", "save_every", "log_every", "out", "data")),
        ):
            changed += [
                f"{name}: {then[group].get(name)} there, {value} asked"
                for name, value in facts[group].items()
                if name not in ignored and then[group].get(name) != value
            ]
        if changed:
            raise UserError(f"{out} is another run ({'; '.join(changed)}): pass another --out")
        return
    if resume:
        raise UserError(f"nothing to resume at {out}: run the same command without --resume")
    if rank() == 0:
        out.mkdir(parents=True, exist_ok=True)
        write_atomic(path, json.dumps(facts, indent=1) + "\n")


def count(step: TrainStep) -> str:
    """Parameters in words."""
    total = sum(parameter.numel() for parameter in step.student.parameters())
    heads = sum(parameter.numel() for parameter in step.heads.parameters()) if step.heads else 0
    return f"student of {total / 1e6:.1f}M parameters" + (f", heads {heads:,}" if heads else "")


def catch_signals() -> list[int]:
    """A list that SIGTERM and SIGINT put themselves into; the loop leaves after the step it is in."""
    received: list[int] = []
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda number, frame: received.append(number))
    return received
