"""Save, resume, load. A checkpoint is one file, written aside and renamed: the newest one is always whole.

<run>/checkpoints/step-00000500.safetensors   parameters, heads, moments and random states, whatever the ZeRO stage
<run>/model.safetensors                       the student alone, in open_clip's names: what eval and export read
"""

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open

from student.contract import Student
from student.distributed import from_all_ranks
from student.models.run_file import write_tensors
from student.training.zero_state import engine_state, load_engine_state
from teachercache.core.errors import UserError
from teachercache.core.process import rank, world_size
from teachercache.core.progress import say


def save(engine: Any, run: Path, step: int) -> None:
    """A checkpoint of everything that the next step depends on; older ones go once it is whole."""
    state = engine_state(engine)
    own = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        own["cuda"] = torch.cuda.get_rng_state()
    for number, states in enumerate(from_all_ranks(own)):
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
    """Whole checkpoints of a run, oldest first."""
    return sorted((run / "checkpoints").glob("step-*.safetensors"))


def last_checkpoint(run: Path) -> Path | None:
    """The newest checkpoint of a run."""
    found = checkpoints_of(run)
    if not found and any((run / "checkpoints").glob("step-*/")):
        raise UserError(
            f"{run / 'checkpoints'} is an older version's, which alone can resume it: pass another --out"
        )
    return found[-1] if found else None


def resume(engine: Any, checkpoint: Path) -> int:
    """Load a checkpoint into the engine; the number of steps that were done."""
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
            f"saved by {world} processes, going on with {world_size()}: a model that draws random numbers draws others"
        )
        torch.manual_seed(torch.initial_seed() + step)
    return step


def _set_random_state(file: Any, names: set[str]) -> None:
    torch.set_rng_state(file.get_tensor(f"random.cpu.{rank()}"))
    if torch.cuda.is_available() and f"random.cuda.{rank()}" in names:
        torch.cuda.set_rng_state(file.get_tensor(f"random.cuda.{rank()}"))


def save_student(student: Student, path: Path) -> None:
    """Write the deployable student, aside and renamed; at ZeRO 3 its shards are gathered first."""
    import deepspeed

    sharded = [parameter for parameter in student.parameters() if hasattr(parameter, "ds_id")]
    with deepspeed.zero.GatheredParameters(sharded):
        state = student.saved_state()
        if rank() == 0:
            write_tensors({name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}, path)
