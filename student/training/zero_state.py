"""Convert the state of an engine to complete tensors by name and back.

The tensors are the same for any ZeRO stage and number of processes. The state consists of parameters and
Adam's moments. All ranks must call these functions. Parameters are gathered one at a time, and rank 0 keeps
the tensors. `checkpoint` writes them to files.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from student.training.step import Engine
from teachercache.core.process import rank

MOMENTS = ("exp_avg", "exp_avg_sq")
MODEL, OPTIM, COUNT = "model.", "optim.", ".step"


def engine_state(engine: Engine) -> dict[str, Tensor]:
    """Return parameters, buffers and moments of an engine on the CPU; return {} on ranks other than 0."""
    state: dict[str, Tensor] = {}
    _link_moments(engine)

    def keep(name: str, value: Tensor | None) -> None:
        if value is not None and rank() == 0:
            state[name] = value.detach().cpu().contiguous().clone()

    for name, parameter in engine.module.named_parameters():
        with _gathered(parameter):
            keep(f"{MODEL}{name}", parameter.data)
        if parameter.requires_grad:
            keep(f"{OPTIM}{name}{COUNT}", _count(engine, parameter))
            for moment in MOMENTS:
                keep(f"{OPTIM}{name}.{moment}", _moment(engine, parameter, moment))
    for name, buffer in _buffers(engine.module):
        keep(f"{MODEL}{name}", buffer)
    return state


def check_engine_state(engine: Engine, names: set[str], shape_of: Callable[[str], Sequence[int]]) -> None:
    """Raise a ValueError or an error of `shape_of` unless the saved tensors have the shapes of an engine.

    Args:
        engine: The engine of the run.
        names: Names of the saved tensors.
        shape_of: Returns the shape of a saved tensor; raises an error if it is missing.
    """
    for name, parameter in engine.module.named_parameters():
        _check_shape(parameter, shape_of(f"{MODEL}{name}"), name)
        if parameter.requires_grad and f"{OPTIM}{name}{COUNT}" in names:
            for moment in MOMENTS:
                _check_shape(parameter, shape_of(f"{OPTIM}{name}.{moment}"), f"{name}.{moment}")
    for name, _ in _buffers(engine.module):
        shape_of(f"{MODEL}{name}")


def load_engine_state(engine: Engine, names: set[str], read: Callable[[str], Tensor]) -> None:
    """Load the tensors of `engine_state` into an engine that has taken no step.

    Args:
        engine: The engine of the run.
        names: Names of the saved tensors.
        read: Returns a saved tensor by name; raises an error if it is missing.
    """
    for name, parameter in engine.module.named_parameters():
        value = read(f"{MODEL}{name}")
        with _gathered(parameter, modifier_rank=0), torch.no_grad():
            if rank() == 0 or not hasattr(parameter, "ds_id"):
                parameter.data.copy_(value)
    for name, buffer in _buffers(engine.module):
        buffer.copy_(read(f"{MODEL}{name}"))
    trained = {
        name: parameter for name, parameter in engine.module.named_parameters() if parameter.requires_grad
    }
    _refresh_masters(engine, trained, read)
    counts = {name: read(f"{OPTIM}{name}{COUNT}") for name in trained if f"{OPTIM}{name}{COUNT}" in names}
    if not counts:
        return  # the checkpoint was saved before the first step
    _allocate_moments(engine, max(counts.values(), key=float))
    for name in counts:
        for moment in MOMENTS:
            _set_moment(engine, trained[name], moment, read(f"{OPTIM}{name}.{moment}"), counts[name])


def _gathered(parameter: nn.Parameter, modifier_rank: int | None = None) -> AbstractContextManager[None]:
    """Return a context in which a parameter that ZeRO 3 shards is complete."""
    import deepspeed

    return deepspeed.zero.GatheredParameters(
        [parameter] if hasattr(parameter, "ds_id") else [], modifier_rank
    )


def _buffers(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Return the buffers that a state_dict contains, with their names."""
    state = module.state_dict(keep_vars=True)
    return ((name, buffer) for name, buffer in module.named_buffers() if name in state)


def _check_shape(parameter: nn.Parameter, shape: Sequence[int], name: str) -> None:
    """Raise a ValueError if a shape is not the parameter's."""
    expected = tuple(getattr(parameter, "ds_shape", parameter.shape))
    if tuple(shape) != expected:
        raise ValueError(f"{name} has shape {tuple(shape)}, expected {expected}")


def is_sharded(parameter: nn.Parameter) -> bool:
    """Return whether ZeRO stores the float32 value and the moments of a parameter in its own flat tensors."""
    return hasattr(parameter, "ds_id") or hasattr(parameter, "_hp_mapping")


def set_sharded(parameter: nn.Parameter, value: Tensor, moment: str | None = None) -> None:
    """Set the float32 value or a moment of a parameter in the flat tensors of ZeRO.

    Args:
        parameter: A parameter for which `is_sharded` holds.
        value: The complete tensor, on every rank.
        moment: "exp_avg" or "exp_avg_sq"; None for the float32 value.
    """
    from deepspeed import utils

    if not hasattr(parameter, "ds_id"):
        value = value.to(parameter.device)
        if moment:
            utils.safe_set_full_optimizer_state(parameter, value, moment)
        else:
            utils.safe_set_full_fp32_param(parameter, value)
        return
    # ZeRO 3 has shards of equal size, the last one padded. Its setters of complete tensors assume no padding.
    size = cast(Any, parameter).ds_tensor.numel()
    start = size * dist.get_rank()
    shard = torch.zeros(size, device=parameter.device)
    values = value.flatten()[start : start + size]
    shard[: len(values)] = values
    if moment:
        utils.safe_set_local_optimizer_state(parameter, shard, moment)
    else:
        utils.safe_set_local_fp32_param(parameter, shard)


def _adam(engine: Engine) -> torch.optim.Optimizer:
    """Return the AdamW of torch, which ZeRO 1 to 3 wrap."""
    return getattr(engine.optimizer, "optimizer", engine.optimizer)


def _count(engine: Engine, parameter: nn.Parameter) -> Tensor | None:
    """Return Adam's step count of a parameter, or None before the first step."""
    state = _adam(engine).state
    if is_sharded(parameter):
        return next(iter(state.values()))["step"] if state else None
    return state[parameter]["step"] if parameter in state else None


def _moment(engine: Engine, parameter: nn.Parameter, name: str) -> Tensor | None:
    """Return a moment of a parameter as a complete tensor, or None before the first step."""
    state = _adam(engine).state
    if not is_sharded(parameter):
        return state[parameter][name] if parameter in state else None
    from deepspeed.utils import safe_get_full_optimizer_state

    return safe_get_full_optimizer_state(parameter, name) if state else None


def _refresh_masters(engine: Engine, trained: dict[str, nn.Parameter], read: Callable[[str], Tensor]) -> None:
    """Copy loaded parameters into the float32 master weights of ZeRO."""
    for name, parameter in trained.items():
        if is_sharded(parameter):
            set_sharded(parameter, read(f"{MODEL}{name}"))


def _allocate_moments(engine: Engine, count: Tensor) -> None:
    """Create the moments of ZeRO's flat partitions, which otherwise exist only after the first step."""
    flats: Any = getattr(engine.optimizer, "single_partition_of_fp32_groups", None)
    if flats is None:
        flats = getattr(engine.optimizer, "fp32_partitioned_groups_flat", ())
    for flat in flats:
        moments = {name: torch.zeros_like(flat) for name in MOMENTS}
        # Each partition has a step count of its own
        _adam(engine).state[flat] = {"step": count.clone().to(flat.device), **moments}
    _link_moments(engine)


def _link_moments(engine: Engine) -> None:
    """Map parameters to their slices of the flat moments; ZeRO 1 and 2 do this for the first group only."""
    state = _adam(engine).state
    groups = zip(
        getattr(engine.optimizer, "bit16_groups", ()),
        getattr(engine.optimizer, "single_partition_of_fp32_groups", ()),
        strict=True,
    )
    for parameters, flat in groups:
        for parameter in parameters:
            if parameter._hp_mapping is not None and flat in state:
                parameter._hp_mapping.set_optim_state_fragment(flat, state[flat])


def _set_moment(engine: Engine, parameter: nn.Parameter, name: str, value: Tensor, count: Tensor) -> None:
    """Set a moment and the step count of a parameter."""
    if is_sharded(parameter):
        set_sharded(parameter, value, name)
    else:
        count, value = count.clone().to(parameter.device), value.to(parameter.device)
        _adam(engine).state[parameter] |= {"step": count, name: value}
