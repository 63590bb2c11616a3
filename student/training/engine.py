"""DeepSpeed around a TrainStep: parameter groups, schedule, configuration. One process needs no launcher."""

import contextlib
import datetime
import importlib.util
import math
import os
import socket
import sys
from collections.abc import Iterator
from typing import Any, cast

import torch
from torch import nn

from student.contract import (
    Capability,
    CheckpointsActivations,
    Student,
    reason_against,
)
from student.recipe import Optim, Run
from student.training.zero_state import is_sharded, set_sharded
from teachercache.core.errors import UserError
from teachercache.core.progress import say

MAX_LOG_SCALE = math.log(100)  # CLIP: logit scales are clamped to this after each step


def parameter_groups(step: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Decay on matrices; none on biases, norms, scales and embeddings of one dimension."""
    parameters = [parameter for parameter in step.parameters() if parameter.requires_grad]
    decayed = [parameter for parameter in parameters if parameter.ndim > 1]
    plain = [parameter for parameter in parameters if parameter.ndim <= 1]
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": plain, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def learning_rate(optim: Optim, step: int, steps: int) -> float:
    """Linear warm-up over a share of the steps, then a cosine or a line to zero."""
    warmup = max(1, round(optim.warmup * steps))
    if step < warmup:
        return optim.lr * (step + 1) / warmup
    done = (step - warmup) / max(1, steps - warmup)
    return optim.lr * (1 - done if optim.schedule == "linear" else 0.5 * (1 + math.cos(math.pi * done)))


def deepspeed_config(run: Run, optim: Optim, rows_per_rank: int, parameters: int) -> dict[str, Any]:
    """The whole configuration; every default of DeepSpeed that would change the mathematics is set.

    Its gradient bucket has 500 million elements, 2 GB, whatever the model's size: no more here than are trained.
    """
    micro = run.micro_batch or rows_per_rank
    return {
        "train_micro_batch_size_per_gpu": micro,
        "gradient_accumulation_steps": rows_per_rank // micro,
        "gradient_clipping": optim.max_grad_norm,  # DeepSpeed's own default is 1.0
        "zero_optimization": {"stage": run.zero, "reduce_bucket_size": max(1, min(500_000_000, parameters))},
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 10**9,
        "wall_clock_breakdown": False,
    }


def start_distributed(device: str) -> None:
    """Join the process group, or make one of a single process."""
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
        dist.init_process_group(
            backend, timeout=datetime.timedelta(hours=1)
        )  # others wait while one evaluates


def set_up_student(student: Student, run: Run) -> None:
    """Turn on recomputation of activations and torch.compile if asked for and possible; else print the reason."""
    if run.grad_checkpointing:
        if Capability.CHECKPOINTS_ACTIVATIONS in student.capabilities():
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
    """Return ": reason" if the student cannot be compiled here, or nothing."""
    if run.zero == 3:
        return ": ZeRO 3 fetches parameters between modules, which breaks the graph at each"
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


def start_engine(step: nn.Module, optim: Optim, run: Run, rows_per_rank: int) -> Any:
    """A DeepSpeed engine over the step; torch's own AdamW."""
    if run.zero not in (0, 1, 2, 3):
        raise UserError(f"--set run.zero={run.zero}: choose 0, 1, 2 or 3")
    if run.precision not in ("float32", "bfloat16"):
        raise UserError(f"--set run.precision={run.precision}: choose float32 or bfloat16")
    if optim.schedule not in ("cosine", "linear"):
        raise UserError(f"--set optim.schedule={optim.schedule}: choose cosine or linear")
    start_distributed(run.device)
    with quiet_deepspeed():
        deepspeed = _import_deepspeed(run.device)
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
        engine.enable_backward_allreduce = False  # it would copy all gradients twice to add nothing (LOG.md)
    return engine


def take_optimizer_step(engine: Any) -> None:
    """The engine's step; what had no part in the loss has a gradient of zero, as it has where DeepSpeed reduces."""
    if not engine.enable_backward_allreduce:
        for parameter in engine.module.parameters():
            if parameter.requires_grad and parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
    engine.step()


def _import_deepspeed(device: str) -> Any:
    """Import DeepSpeed without its noise; on the CPU without the op it would compile for a minute (gloo serves)."""
    if device == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import deepspeed

    if device == "cpu":
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed


@contextlib.contextmanager
def quiet_deepspeed() -> Iterator[None]:
    """DeepSpeed's own lines go to stderr and below warnings nowhere: stdout belongs to the user."""
    import logging
    import warnings

    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    with contextlib.redirect_stdout(sys.stderr), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        warnings.simplefilter("ignore", DeprecationWarning)
        yield


def clamp_scales(engine: Any) -> None:
    """Logit scales at most ln 100, after each step, at any ZeRO stage."""
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
