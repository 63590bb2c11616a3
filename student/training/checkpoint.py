"""Save and resume checkpoints, and save the trained student.

- `<run>/checkpoints/step-00000500.safetensors`: student, heads, Adam's moments and random states, for any
  ZeRO stage.
- `<run>/model.safetensors`: the student alone, for `student eval` and `student export`.

A file is written under another name and renamed, so that it is never incomplete.
"""

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open

from student.contract import Student
from student.distributed import from_all_ranks
from student.models.run_file import write_tensors
from student.training.step import Engine
from student.training.zero_state import engine_state, load_engine_state
from teachercache.core.errors import UserError
from teachercache.core.process import rank, world_size
from teachercache.core.progress import say


def save(engine: Engine, run: Path, step: int) -> None:
    """Save everything that the next step depends on, then delete older checkpoints.

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
    if rank() == 0:
        folder = run / "checkpoints"
        folder.mkdir(exist_ok=True)
        write_tensors(
            state, folder / f"step-{step:08d}.safetensors", {"step": str(step), "world": str(world_size())}
        )
        for old in (*checkpoints_of(run)[:-1], *folder.glob("*.partial")):
            old.unlink()
    dist.barrier()


def checkpoints_of(run: Path) -> list[Path]:
    """Return the complete checkpoints of a run, oldest first."""
    return sorted((run / "checkpoints").glob("step-*.safetensors"))


def last_checkpoint(run: Path) -> Path | None:
    """Return the newest checkpoint of a run, or None; raise a UserError for the format of older versions."""
    checkpoints = checkpoints_of(run)
    if not checkpoints and any((run / "checkpoints").glob("step-*/")):
        raise UserError(
            f"{run / 'checkpoints'} was written by an older version, which alone can resume it: pass "
            "another --out"
        )
    return checkpoints[-1] if checkpoints else None


def resume(engine: Engine, checkpoint: Path) -> int:
    """Load a checkpoint into the engine, and return the number of steps that were taken before it."""
    try:
        with safe_open(checkpoint, "pt") as file:
            facts, names = file.metadata(), set(file.keys())
            load_engine_state(engine, names, file.get_tensor)
            step, world = int(facts["step"]), int(facts["world"])
            if world == world_size():
                _set_random_state(file, names)
    except (SafetensorError, ValueError, KeyError, TypeError) as error:
        reason = (str(error).splitlines() or [""])[0][:120]
        raise UserError(
            f"{checkpoint} cannot be loaded ({reason}): remove {checkpoint.parent} to start over"
        ) from error
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


def save_student(student: Student, path: Path) -> None:
    """Write the tensors of the student; under ZeRO 3 its shards are gathered first."""
    import deepspeed

    sharded = [parameter for parameter in student.parameters() if hasattr(parameter, "ds_id")]
    with deepspeed.zero.GatheredParameters(sharded):
        state = student.saved_state()
        if rank() == 0:
            write_tensors({name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}, path)
