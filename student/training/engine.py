"""Wrap a TrainStep in a DeepSpeed engine: parameter groups, learning-rate schedule, configuration.

A run of a single process needs no launcher.
"""

import contextlib
import datetime
import importlib
import importlib.util
import math
import os
import socket
import sys
from collections.abc import Iterator
from types import ModuleType
from typing import Any, cast

import torch
from torch import Tensor, nn

from student.contract import (
    Capability,
    CheckpointsActivations,
    Student,
    reason_against,
)
from student.recipe import Optim, Run
from student.training.batch_norm import has_trained_batch_norm
from student.training.step import Engine, TrainStep
from student.training.zero_state import is_sharded, set_sharded
from teachercache.core.errors import UserError
from teachercache.core.progress import say, status

MAX_LOG_SCALE = math.log(100)  # as in CLIP, logit scales are clamped to this after each step


def parameter_groups(step: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Return optimizer groups with weight decay for matrices, and without it for biases, norms and scales."""
    parameters = [parameter for parameter in step.parameters() if parameter.requires_grad]
    decayed = [parameter for parameter in parameters if parameter.ndim > 1]
    undecayed = [parameter for parameter in parameters if parameter.ndim <= 1]
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": undecayed, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def learning_rate(optim: Optim, step: int, steps: int) -> float:
    """Return the learning rate of a step: linear warm-up, then cosine or linear decay to zero."""
    warmup = max(1, round(optim.warmup * steps))
    if step < warmup:
        return optim.lr * (step + 1) / warmup
    done = (step - warmup) / max(1, steps - warmup)
    return optim.lr * (1 - done if optim.schedule == "linear" else 0.5 * (1 + math.cos(math.pi * done)))


def deepspeed_config(run: Run, optim: Optim, rows_per_rank: int, parameters: int) -> dict[str, Any]:
    """Return the configuration of DeepSpeed. It sets every default that would change the numbers.

    DeepSpeed allocates a gradient bucket of 500 million elements (2 GB) by default; here it is at most as
    large as the trained parameters.

    Args:
        run: Settings of the run.
        optim: Settings of the optimizer.
        rows_per_rank: Rows of a step on each rank.
        parameters: Number of trained parameters.
    """
    micro = run.micro_batch or rows_per_rank
    return {
        "train_micro_batch_size_per_gpu": micro,
        "gradient_accumulation_steps": rows_per_rank // micro,
        "gradient_clipping": optim.max_grad_norm,  # the default of DeepSpeed is 1.0
        "zero_optimization": {"stage": run.zero, "reduce_bucket_size": max(1, min(500_000_000, parameters))},
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 10**9,
        "wall_clock_breakdown": False,
    }


RANK_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def start_distributed(device: str) -> None:
    """Join the process group of the launcher, or create one with a single process."""
    import torch.distributed as dist

    if "RANK" not in os.environ:
        with socket.socket() as sock:
            sock.bind(("127.0.0.1", 0))
            port = sock.getsockname()[1]
        single = {
            "RANK": "0",
            "LOCAL_RANK": "0",
            "WORLD_SIZE": "1",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
        }
        os.environ.update(single)
    if not dist.is_initialized():
        backend = "nccl" if device.startswith("cuda") else "gloo"
        # A long timeout, because the other ranks wait while rank 0 evaluates
        dist.init_process_group(backend, timeout=datetime.timedelta(hours=1))


def set_up_student(student: Student, run: Run) -> None:
    """Turn on activation checkpointing and torch.compile as the run requests.

    Where the student does not support one of them, print the reason.
    """
    if run.grad_checkpointing:
        if has_trained_batch_norm(cast(nn.Module, student)):
            say("run.grad_checkpointing is off: BatchNorm's statistics would move twice a step")
        elif Capability.CHECKPOINTS_ACTIVATIONS in student.capabilities():
            cast(CheckpointsActivations, student).checkpoint_activations()
        else:
            reason = reason_against(student, Capability.CHECKPOINTS_ACTIVATIONS)
            say(f"run.grad_checkpointing is off{reason}")
    if run.compile:
        if reason := reason_against_compiling(student, run):
            say(f"run.compile is off{reason}")
        else:
            cast(nn.Module, student).compile()


def reason_against_compiling(student: Student, run: Run) -> str:
    """Return ": REASON" if the student cannot be compiled on this machine, otherwise ""."""
    if run.zero == 3:
        return ": ZeRO 3 gathers parameters between modules, which breaks the graph at each of them"
    if Capability.COMPILES not in student.capabilities():
        return reason_against(student, Capability.COMPILES) or ": this student cannot be compiled"
    if run.device.startswith("cuda"):
        return "" if importlib.util.find_spec("triton") else ": the package triton is missing"
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except (InvalidCxxCompiler, RuntimeError):
        return ": no C++ compiler is installed"
    return ""


def start_engine(step: TrainStep, optim: Optim, run: Run, rows_per_rank: int) -> Engine:
    """Return a DeepSpeed engine around the step, with AdamW of torch.

    Args:
        step: Student, heads and loss.
        optim: Settings of the optimizer.
        run: Settings of the run.
        rows_per_rank: Rows of a step on each rank.

    Raises:
        UserError: An unknown ZeRO stage, precision or schedule.
    """
    if run.zero not in (0, 1, 2, 3):
        raise UserError(f"--set run.zero={run.zero}: choose 0, 1, 2 or 3")
    if run.precision not in ("float32", "bfloat16"):
        raise UserError(f"--set run.precision={run.precision}: choose float32 or bfloat16")
    if optim.schedule not in ("cosine", "linear"):
        raise UserError(f"--set optim.schedule={optim.schedule}: choose cosine or linear")
    start_distributed(run.device)
    with status("importing DeepSpeed"), quiet_deepspeed():
        deepspeed = _import_deepspeed(run.device)
    with quiet_deepspeed():
        groups = parameter_groups(step, optim.weight_decay)
        trained = sum(parameter.numel() for group in groups for parameter in group["params"])
        betas = (optim.beta1, optim.beta2)
        optimizer = torch.optim.AdamW(groups, lr=optim.lr, betas=betas, eps=optim.eps, fused=True)
        engine, *_ = deepspeed.initialize(
            model=step,
            optimizer=optimizer,
            config=deepspeed_config(run, optim, rows_per_rank, trained),
            dist_init_required=False,
        )
    if torch.distributed.get_world_size() == 1 and run.zero == 0:
        # The reduction over one rank would copy all gradients twice (LOG.md)
        engine.enable_backward_allreduce = False
    return engine


def take_optimizer_step(engine: Engine) -> None:
    """Take an optimizer step, with a zero gradient for trained parameters that the loss does not depend on.

    DeepSpeed's reduction over ranks sets these gradients to zero; without it they would be None.
    """
    if not engine.enable_backward_allreduce:
        for parameter in engine.module.parameters():
            if parameter.requires_grad and parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
    engine.step()


def _import_deepspeed(device: str) -> ModuleType:
    """Import DeepSpeed for a device, also after a training of this process on another one.

    On the CPU, disable an op that takes a minute to compile and that gloo replaces.
    """
    if device == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import deepspeed
    from deepspeed.accelerator import get_accelerator, set_accelerator

    kind = device.partition(":")[0]
    if kind in ("cpu", "cuda") and get_accelerator().device_name() != kind:
        module = importlib.import_module(f"deepspeed.accelerator.{kind}_accelerator")
        set_accelerator(getattr(module, f"{kind.upper()}_Accelerator")())
    if device == "cpu":
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed


@contextlib.contextmanager
def unchanged_process() -> Iterator[None]:
    """Undo what a training changes in its process, so that a second one finds what it would find in a new process.

    - The process group of a single process is left, and its variables are removed, or children would take them for those
      of a launcher. A launcher's group stays.
    - The state of torch's random generators is put back.
    - `torch.nn.functional.linear` is put back: ZeRO 3 replaces it by a function that rounds differently.
    - Compiled code is dropped: after a few students torch.compile would give up, and the student would run uncompiled.
    """
    variables = {name: os.environ.get(name) for name in (*RANK_VARIABLES, "DS_ACCELERATOR", "WANDB_SILENT")}
    linear, random = nn.functional.linear, random_state()
    grouped = torch.distributed.is_available() and torch.distributed.is_initialized()
    try:
        yield
    finally:
        nn.functional.linear = linear
        set_random_state(random)
        if variables["RANK"] is None and not grouped:
            leave_distributed()
        for name, value in variables.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value
        if "torch._dynamo" in sys.modules:
            torch.compiler.reset()


def random_state() -> tuple[Tensor, Tensor | None]:
    """Return the states of the random generators of the CPU and of this process's GPU."""
    return torch.get_rng_state(), torch.cuda.get_rng_state() if torch.cuda.is_available() else None


def set_random_state(state: tuple[Tensor, Tensor | None]) -> None:
    """Restore the states that `random_state` returned."""
    torch.set_rng_state(state[0])
    if state[1] is not None:
        torch.cuda.set_rng_state(state[1])


def leave_distributed() -> None:
    """Leave the process group, in torch and in DeepSpeed, which keeps a reference of its own."""
    if not torch.distributed.is_initialized():
        return
    comm = sys.modules.get("deepspeed.comm.comm")
    if comm is None or comm.cdb is None:
        torch.distributed.destroy_process_group()
    else:
        comm.destroy_process_group()
        comm.cdb = None


@contextlib.contextmanager
def quiet_deepspeed() -> Iterator[None]:
    """Send the output of DeepSpeed to stderr, and drop its messages below the level of errors."""
    import logging
    import warnings

    logger = logging.getLogger("DeepSpeed")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stdout(sys.stderr), warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            warnings.simplefilter("ignore", DeprecationWarning)
            yield
    finally:
        logger.setLevel(level)


def clamp_scales(engine: Engine) -> None:
    """Clamp logit scales to at most ln 100, under any ZeRO stage."""
    for name, parameter in engine.module.named_parameters():
        if not name.endswith("logit_scale") or not parameter.requires_grad:
            continue
        if is_sharded(parameter):
            from deepspeed.utils import safe_get_full_fp32_param

            value = safe_get_full_fp32_param(parameter)
            if bool((value > MAX_LOG_SCALE).any()):
                set_sharded(parameter, value.clamp(max=MAX_LOG_SCALE))
        with torch.no_grad():
            parameter.data.clamp_(max=MAX_LOG_SCALE)
