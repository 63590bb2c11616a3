"""Save and resume checkpoints, and save the trained student.

- `<run>/checkpoints/step-00000500.safetensors`: student, heads, Adam's moments and random states, for any
  ZeRO stage.
- `<run>/model.safetensors`: the student alone, for `student eval` and `student export`.

A file is written under another name and renamed, so that it is never incomplete. Its digest in digests.json tells
whether it is whole; the last two checkpoints are kept, so that one of them may be damaged.
"""

import os
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from student.contract import Student
from student.distributed import from_all_ranks, on_first_rank
from student.models.run_file import WEIGHTS, first_line, write_tensors
from student.training.step import Engine
from student.training.zero_state import check_engine_state, engine_state, load_engine_state
from teachercache.core.digests import damage_of, remove_proved
from teachercache.core.errors import UserError
from teachercache.core.process import rank, world_size
from teachercache.core.progress import say


def save(engine: Engine, run: Path, step: int) -> None:
    """Save everything that the next step depends on; `remove_old` removes older checkpoints.

    Args:
        engine: The engine of the run.
        run: The run folder.
        step: Number of steps taken.
    """
    state = engine_state(engine)
    random_states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        random_states["cuda"] = torch.cuda.get_rng_state()
    for number, states in enumerate(from_all_ranks(random_states)):
        state |= {f"random.{kind}.{number}": value for kind, value in states.items()}
    folder = run / "checkpoints"

    def write() -> None:
        folder.mkdir(exist_ok=True)
        facts = {"step": str(step), "world": str(world_size())}
        write_tensors(state, folder / f"step-{step:08d}.safetensors", run, facts)
        for damaged in folder.glob("*.damaged"):
            remove_proved(damaged, run)

    on_first_rank(write)


def remove_old(run: Path, keep: int) -> None:
    """Remove all but the newest checkpoints of a run."""
    for old in checkpoints_of(run)[: -max(1, keep)]:
        remove_proved(old, run)


def checkpoints_of(run: Path) -> list[Path]:
    """Return the complete checkpoints of a run, oldest first."""
    return sorted((run / "checkpoints").glob("step-*.safetensors"))


def resume_newest(engine: Engine, run: Path) -> int | None:
    """Load the newest checkpoint of a run that is whole, and set damaged ones aside.

    Returns:
        The number of steps taken before it, or None if there is no checkpoint yet.

    Raises:
        UserError: All checkpoints are damaged, do not fit, or have the format of older versions.
    """
    checkpoints = checkpoints_of(run)[::-1]
    if not checkpoints and any((run / "checkpoints").glob("step-*/")):
        raise UserError(
            f"{run / 'checkpoints'} was written by an older version, which alone can resume it: pass "
            "another --out"
        )
    # Rank 0 alone reads the files for the check; the others take its answer
    reasons = (reason_against(engine, path, run) if rank() == 0 else "" for path in checkpoints)
    bad: list[Path] = []
    for path, reason in zip(checkpoints, reasons, strict=True):
        reason = from_all_ranks(reason)[0]
        if not reason:
            step = resume(engine, path)
            on_first_rank(lambda: _set_aside(bad, run))
            return step
        bad.append(path)
        if path == checkpoints[-1]:
            raise UserError(f"{path} cannot be loaded ({reason}): remove {path.parent} to start over")
        say(f"WARNING: {path} cannot be loaded ({reason}): going on from the checkpoint before it")
    return None


def reason_against(engine: Engine, checkpoint: Path, run: Path) -> str:
    """Return why a checkpoint cannot be loaded into an engine, or "": nothing is loaded before that is known."""
    if damage_of(run, checkpoint.relative_to(run).as_posix()):
        return "it is damaged: its bytes are not those that were written"
    try:
        with safe_open(checkpoint, "pt") as file:
            check_engine_state(engine, set(file.keys()), lambda name: file.get_slice(name).get_shape())
            int(file.metadata()["step"]), int(file.metadata()["world"])
    except (SafetensorError, ValueError, KeyError, TypeError) as error:
        return first_line(error)
    return ""


def _set_aside(checkpoints: list[Path], run: Path) -> None:
    """Rename damaged checkpoints, so that none counts as the newest; the next save removes them."""
    for checkpoint in checkpoints:
        os.replace(checkpoint, checkpoint.with_name(checkpoint.name + ".damaged"))
        remove_proved(checkpoint, run)


def resume(engine: Engine, checkpoint: Path) -> int:
    """Load a checkpoint into the engine, and return the number of steps that were taken before it."""
    with safe_open(checkpoint, "pt") as file:
        facts, names = file.metadata(), set(file.keys())
        load_engine_state(engine, names, file.get_tensor)
        step, world = int(facts["step"]), int(facts["world"])
        if world == world_size():
            _set_random_state(file, names)
    if world != world_size():
        say(
            f"saved by {world} processes, resuming with {world_size()}: random numbers such as dropout masks "
            "differ"
        )
        torch.manual_seed(torch.initial_seed() + step)
    return step


def _set_random_state(file: Any, names: set[str]) -> None:
    """Restore the random states of this rank from an open safetensors file."""
    torch.set_rng_state(file.get_tensor(f"random.cpu.{rank()}"))
    if torch.cuda.is_available() and f"random.cuda.{rank()}" in names:
        torch.cuda.set_rng_state(file.get_tensor(f"random.cuda.{rank()}"))


def save_student(student: Student, folder: Path) -> None:
    """Write the tensors of the student into a folder; under ZeRO 3 its shards are gathered first."""
    import deepspeed

    sharded = [parameter for parameter in student.parameters() if hasattr(parameter, "ds_id")]
    with deepspeed.zero.GatheredParameters(sharded):
        state = student.saved_state()
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items() if rank() == 0}
        on_first_rank(lambda: write_tensors(tensors, folder / WEIGHTS, folder))
