"""How ranks split a batch, and the one differentiable gather.

In a run of a single process every function is the identity.
"""

from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor

from teachercache.core.errors import MachineError, UserError
from teachercache.core.process import rank

T = TypeVar("T")


def num_ranks() -> int:
    """Return the number of processes that train together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def first_row(rows: int) -> int:
    """Return the position of this rank's first row in the global batch, if every rank has `rows` rows."""
    return (dist.get_rank() if num_ranks() > 1 else 0) * rows


class _Gather(torch.autograd.Function):
    """Concatenate the rows of all ranks; the backward pass sums the gradients of all ranks' losses.

    Every rank computes the loss of the global batch, so this sum is the number of ranks times the true
    gradient. Data-parallel engines average parameter gradients over ranks, which makes the result exact.
    """

    @staticmethod
    def forward(ctx: Any, rows: Tensor) -> Tensor:
        ctx.rows = len(rows)
        blocks = [torch.empty_like(rows) for _ in range(num_ranks())]
        dist.all_gather(blocks, rows.contiguous())
        return torch.cat(blocks)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        # A copy, because autograd may share the tensor with other branches
        gradient = gradient.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(gradient)
        start = first_row(ctx.rows)
        return gradient[start : start + ctx.rows]


def gather(rows: Float[Tensor, "n ..."]) -> Float[Tensor, "world_n ..."]:
    """Return the rows of the global batch in rank order, differentiable; ranks must pass equally many."""
    return rows if num_ranks() == 1 else _Gather.apply(rows)


def mean_over_ranks(value: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    """Return the mean of a logged value over ranks."""
    if num_ranks() == 1:
        return value
    value = value.clone()
    dist.all_reduce(value)
    return value / num_ranks()


def any_rank(value: bool) -> bool:
    """Return whether `value` is true on any rank, for decisions that all ranks must make together."""
    return any_of_ranks((value,))[0]


def any_of_ranks(values: tuple[bool, ...]) -> list[bool]:
    """Return for each value whether it is true on any rank, with one reduction."""
    if num_ranks() == 1:
        return list(values)
    flags = torch.tensor([float(v) for v in values], device="cuda" if dist.get_backend() == "nccl" else "cpu")
    dist.all_reduce(flags, op=dist.ReduceOp.MAX)
    return [bool(flag) for flag in flags.tolist()]


def on_first_rank(work: Callable[[], Any]) -> None:
    """Run a function on rank 0, and wait for it on the others; its error stops all ranks.

    Raises:
        UserError: Also on the other ranks, with the message of rank 0.
        MachineError: On the other ranks, if rank 0 failed otherwise.
    """
    failure: Exception | None = None
    if rank() == 0:
        try:
            work()
        except Exception as error:  # the other ranks wait, so that all of them stop
            failure = error
    if num_ranks() == 1:
        if failure is not None:
            raise failure
        return
    mine = (failure is not None, str(failure or ""), isinstance(failure, UserError))
    failed, message, mistake = from_all_ranks(mine)[0]
    if failed:
        raise failure or (UserError if mistake else MachineError)(message or "the first process failed")


def from_all_ranks(value: T) -> list[T]:
    """Return the picklable value of every rank, in rank order."""
    if num_ranks() == 1:
        return [value]
    values: list[Any] = [None] * num_ranks()
    dist.all_gather_object(values, value)
    return values
