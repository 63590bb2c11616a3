"""How ranks split a batch, and the one differentiable gather. On one process all of it is the identity."""

from typing import Any

import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor


def num_ranks() -> int:
    """Processes that train together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def first_row(rows: int) -> int:
    """Where this rank's rows start in the global batch."""
    return (dist.get_rank() if num_ranks() > 1 else 0) * rows


class _Gather(torch.autograd.Function):
    """Rows of all ranks in rank order; the gradient of a rank's rows is the sum over all ranks' losses.

    Every rank computes the loss of the whole batch, so that sum is world size times the true gradient, and averaging
    parameter gradients over ranks, as data-parallel engines do, makes it exact.
    """

    @staticmethod
    def forward(ctx, rows: Tensor) -> Tensor:
        ctx.rows = len(rows)
        parts = [torch.empty_like(rows) for _ in range(num_ranks())]
        dist.all_gather(parts, rows.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        gradient = gradient.clone(
            memory_format=torch.contiguous_format
        )  # autograd may share it with other branches
        dist.all_reduce(gradient)
        start = first_row(ctx.rows)
        return gradient[start : start + ctx.rows]


def gather(rows: Float[Tensor, "n ..."]) -> Float[Tensor, "world_n ..."]:
    """The global batch's rows, differentiable; every rank must hold equally many."""
    return rows if num_ranks() == 1 else _Gather.apply(rows)


def mean_over_ranks(value: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    """Mean of a logged value over ranks."""
    if num_ranks() == 1:
        return value
    value = value.clone()
    dist.all_reduce(value)
    return value / num_ranks()


def any_rank(value: bool) -> bool:
    """Whether it is so on any rank: what all of them must do together is decided by this."""
    if num_ranks() == 1:
        return value
    flag = torch.tensor(float(value), device="cuda" if dist.get_backend() == "nccl" else "cpu")
    dist.all_reduce(flag, op=dist.ReduceOp.MAX)
    return bool(flag)


def from_all_ranks(value: Any) -> list[Any]:
    """Any picklable value of every rank, in rank order."""
    if num_ranks() == 1:
        return [value]
    values: list[Any] = [None] * num_ranks()
    dist.all_gather_object(values, value)
    return values
