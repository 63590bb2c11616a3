"""An engine's parameters and Adam's moments as whole tensors by name, and back: the same at every ZeRO stage and number
of processes. Not for files: see `checkpoint`.

Every rank takes part; rank 0 holds the tensors, one parameter being gathered at a time.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from teachercache.core.process import rank

MOMENTS = ("exp_avg", "exp_avg_sq")
MODEL, OPTIM, COUNT = "model.", "optim.", ".step"


def engine_state(engine: Any) -> dict[str, Tensor]:
    """Parameters, buffers and moments of an engine, float32 on the CPU; {} on ranks other than 0."""
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


def load_engine_state(engine: Any, names: set[str], read: Callable[[str], Tensor]) -> None:
    """Put what `engine_state` returned into an engine that has taken no step; KeyError where a tensor is missing."""
    for name, parameter in engine.module.named_parameters():
        value = _like(parameter, read(f"{MODEL}{name}"), name)
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
        return  # saved before the first step
    _allocate_moments(engine, max(counts.values(), key=float))
    for name in counts:
        for moment in MOMENTS:
            _set_moment(engine, trained[name], moment, read(f"{OPTIM}{name}.{moment}"), counts[name])


def _gathered(parameter: nn.Parameter, modifier_rank: int | None = None) -> Any:
    import deepspeed

    return deepspeed.zero.GatheredParameters(
        [parameter] if hasattr(parameter, "ds_id") else [], modifier_rank
    )


def _buffers(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """What a state_dict holds beside parameters."""
    kept = module.state_dict(keep_vars=True)
    return ((name, buffer) for name, buffer in module.named_buffers() if name in kept)


def _like(parameter: nn.Parameter, value: Tensor, name: str) -> Tensor:
    shape = tuple(getattr(parameter, "ds_shape", parameter.shape))
    if tuple(value.shape) != shape:
        raise ValueError(f"{name} is {tuple(value.shape)} there and {shape} here")
    return value


def is_sharded(parameter: nn.Parameter) -> bool:
    """Whether ZeRO keeps the float32 value and the moments of a parameter in flat tensors of its own."""
    return hasattr(parameter, "ds_id") or hasattr(parameter, "_hp_mapping")


def set_sharded(parameter: nn.Parameter, value: Tensor, moment: str | None = None) -> None:
    """Set the float32 value that ZeRO keeps of a parameter, or a moment; every rank passes the whole tensor."""
    from deepspeed import utils

    if not hasattr(parameter, "ds_id"):
        value = value.to(parameter.device)
        if moment:
            utils.safe_set_full_optimizer_state(parameter, value, moment)
        else:
            utils.safe_set_full_fp32_param(parameter, value)
        return
    # ZeRO 3 has equal parts, the last one padded; its own functions for whole tensors take the size for even
    size = parameter.ds_tensor.numel()
    start = size * dist.get_rank()
    part = torch.zeros(size, device=parameter.device)
    own = value.flatten()[start : start + size]
    part[: len(own)] = own
    if moment:
        utils.safe_set_local_optimizer_state(parameter, part, moment)
    else:
        utils.safe_set_local_fp32_param(parameter, part)


def _adam(engine: Any) -> torch.optim.Optimizer:
    """Torch's optimizer, which ZeRO 1 to 3 wrap."""
    return getattr(engine.optimizer, "optimizer", engine.optimizer)


def _count(engine: Any, parameter: nn.Parameter) -> Tensor | None:
    """Adam's number of steps of a parameter; None before the first."""
    state = _adam(engine).state
    if is_sharded(parameter):
        return next(iter(state.values()))["step"] if state else None
    return state[parameter]["step"] if parameter in state else None


def _moment(engine: Any, parameter: nn.Parameter, name: str) -> Tensor | None:
    state = _adam(engine).state
    if not is_sharded(parameter):
        return state[parameter][name] if parameter in state else None
    from deepspeed.utils import safe_get_full_optimizer_state

    return safe_get_full_optimizer_state(parameter, name) if state else None


def _refresh_masters(engine: Any, trained: dict[str, nn.Parameter], read: Callable[[str], Tensor]) -> None:
    """ZeRO's own float32 copies follow the parameters that were just loaded."""
    for name, parameter in trained.items():
        if is_sharded(parameter):
            set_sharded(parameter, read(f"{MODEL}{name}"))


def _allocate_moments(engine: Any, count: Tensor) -> None:
    """ZeRO keeps moments of flat partitions, which exist from the first step on."""
    flats = getattr(engine.optimizer, "single_partition_of_fp32_groups", None)
    if flats is None:
        flats = getattr(engine.optimizer, "fp32_partitioned_groups_flat", ())
    for flat in flats:
        moments = {name: torch.zeros_like(flat) for name in MOMENTS}
        _adam(engine).state[flat] = {"step": count.clone().to(flat.device), **moments}  # each its own
    _link_moments(engine)


def _link_moments(engine: Any) -> None:
    """Tell ZeRO 1 and 2 where a parameter's moments lie in the flat ones: they do so for their first group alone."""
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


def _set_moment(engine: Any, parameter: nn.Parameter, name: str, value: Tensor, count: Tensor) -> None:
    if is_sharded(parameter):
        set_sharded(parameter, value, name)
    else:
        count, value = count.clone().to(parameter.device), value.to(parameter.device)
        _adam(engine).state[parameter] |= {"step": count, name: value}
