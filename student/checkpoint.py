"""Save, resume, load. A checkpoint is written aside and renamed: the newest one is always whole.

<run>/checkpoints/step-00000500/   DeepSpeed's files, with RNG and step in the client state
<run>/model.safetensors            the student alone, in open_clip's names: what eval and export read
"""

import contextlib
import json
import os
import pickle
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import nn

from student.distributed import from_all_ranks
from student.models.two_tower import TwoTower, open_clip_state, tokenizer_of
from teachercache.names import UserError
from teachercache.runtime import rank
from teachercache.store import flush
from teachercache.teachers.clip import build_module


def save(engine: Any, run: Path, step: int) -> None:
    """A checkpoint of everything that the next step depends on; older ones go once it is whole."""
    tag = f"step-{step:08d}"
    own = [torch.get_rng_state(), *([torch.cuda.get_rng_state()] if torch.cuda.is_available() else [])]
    state = {"step": step, "rng": from_all_ranks(own)}
    folder, partial = run / "checkpoints", run / "checkpoints.partial"
    if rank() == 0:
        shutil.rmtree(partial, ignore_errors=True)
    dist.barrier()
    engine.save_checkpoint(str(partial), tag=tag, client_state=state, save_latest=False)
    dist.barrier()
    if rank() == 0:
        for path in partial.rglob("*.pt"):
            flush(path)
        folder.mkdir(exist_ok=True)
        shutil.rmtree(folder / tag, ignore_errors=True)
        os.replace(partial / tag, folder / tag)
        shutil.rmtree(partial)
        for old in sorted(folder.glob("step-*"))[:-1]:
            shutil.rmtree(old)
    dist.barrier()


def last_checkpoint(run: Path) -> Path | None:
    """The newest checkpoint of a run."""
    found = sorted((run / "checkpoints").glob("step-*"))
    return found[-1] if found else None


def resume(engine: Any, checkpoint: Path) -> int:
    """Load a checkpoint into the engine; the number of steps that were done."""
    try:
        with only_weights():
            path, state = engine.load_checkpoint(str(checkpoint.parent), tag=checkpoint.name)
        if path is None:
            raise ValueError("files are missing")
    except (pickle.UnpicklingError, RuntimeError, ValueError, EOFError, KeyError) as error:
        reason = str(error).splitlines()[0][:120]
        raise UserError(
            f"{checkpoint} cannot be loaded ({reason}): remove {checkpoint.parent} to start over"
        ) from error
    cpu, *cuda = state["rng"][rank()]
    torch.set_rng_state(cpu)
    if cuda and torch.cuda.is_available():
        torch.cuda.set_rng_state(cuda[0])
    return state["step"]


@contextlib.contextmanager
def only_weights() -> Iterator[None]:
    """DeepSpeed loads with weights_only=False; inside this no checkpoint can run code."""
    before = os.environ.get("TORCH_FORCE_WEIGHTS_ONLY_LOAD")
    os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] = "1"
    try:
        with torch.serialization.safe_globals(_deepspeed_types()):
            yield
    finally:
        os.environ.pop("TORCH_FORCE_WEIGHTS_ONLY_LOAD")
        if before is not None:
            os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] = before


def _deepspeed_types() -> list[Any]:
    """The plain records that DeepSpeed puts into its ZeRO checkpoints."""
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    return [DynamicLossScaler, LossScaler, ZeroStageEnum, fragment_address]


def save_student(student: nn.Module, path: Path) -> None:
    """The deployable student, float32, written aside and renamed; at ZeRO 3 its parts are gathered first."""
    import deepspeed

    sharded = [parameter for parameter in student.parameters() if hasattr(parameter, "ds_id")]
    with deepspeed.zero.GatheredParameters(sharded):
        state = open_clip_state(student) if isinstance(student, TwoTower) else student.state_dict()
        if rank() == 0:
            partial = path.with_name(path.name + ".partial")
            save_file({name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}, partial)
            flush(partial)
            os.replace(partial, path)


def load_student(run: Path) -> TwoTower:
    """The trained student of a run folder, from that folder alone."""
    if not (run / "run.json").exists():
        raise UserError(f"{run} is not a run: pass a folder that `student train` wrote")
    facts = json.loads((run / "run.json").read_text())
    recipe, made = facts["recipe"], facts["student"]
    if made is None:
        name = recipe["constants"]["model"]
        raise UserError(f"{run} trained {name}, which is no model of its own: see scripts/build_clip_lite.py")
    if not (run / "model.safetensors").exists():
        raise UserError(f"{run} is not a finished run: `student train --recipe {recipe['name']} --resume --out {run}`")
    model, preprocess = build_module(made["model_cfg"], made["preprocess"])
    student = TwoTower(model, made["model_cfg"], preprocess, tokenizer_of(made["model_cfg"]))
    state = load_file(run / "model.safetensors")
    student.model.load_state_dict({**state, "logit_scale": state["logit_scale"].reshape(1)})
    return student.eval()
