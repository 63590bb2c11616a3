"""BatchNorm in training: statistics of the global batch, or frozen statistics where a tower is frozen.

A BatchNorm layer sees all rows of a batch, so N processes that each normalize by their own rows train another model
than one process does. Micro-batches have the same fault, and would move the running statistics twice a step.
"""

import dataclasses
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from teachercache.core.errors import UserError


def set_up_batch_norm(step: nn.Module, *, micro_batches: bool, ranks: int, device: str) -> None:
    """Give each BatchNorm layer of a student the statistics that it is trained with.

    - In a frozen tower, of which only norms or heads are trained, the running statistics stay as they are, as the
      tower that is tuned was trained with them.
    - Otherwise its statistics are those of the rows of all ranks, as on one process.

    Args:
        step: Student and heads, before DeepSpeed wraps them.
        micro_batches: Whether a batch is split into micro-batches.
        ranks: The number of processes.
        device: The device of the run; on CUDA torch's own SyncBatchNorm is used.

    Raises:
        UserError: Micro-batches with a BatchNorm layer that is trained.
    """
    trained = []
    for place in list(batch_norms(step)):
        if is_frozen(place.above):
            place.layer.eval().register_forward_pre_hook(_keep_statistics)
        else:
            trained.append(place)
    if trained and micro_batches:
        raise UserError(
            f"--micro-batch: BatchNorm ({trained[0].name}) normalizes by all rows of a step, which micro-batches do "
            "not have: leave --micro-batch away, lower --batch-size, or choose a model without BatchNorm (a ViT)"
        )
    if ranks > 1:
        for place in trained:
            setattr(place.parent, place.name.rpartition(".")[2], over_ranks(place.layer, device))


@dataclasses.dataclass(frozen=True)
class Place:
    """A BatchNorm layer, its name, its parent, and the smallest module with weight matrices that contains it."""

    name: str
    layer: _BatchNorm
    parent: nn.Module
    above: nn.Module


def batch_norms(module: nn.Module) -> Iterator[Place]:
    """Yield the places of all BatchNorm layers below a module."""
    for name, layer in module.named_modules():
        if not isinstance(layer, _BatchNorm) or isinstance(layer, nn.SyncBatchNorm):
            continue
        parts = name.split(".")
        parents = [module.get_submodule(".".join(parts[:k])) for k in range(len(parts) - 1, -1, -1)]
        above = next((parent for parent in parents if _matrices(parent)), module)
        yield Place(name, layer, parents[0], above)


def _matrices(module: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in module.parameters() if parameter.ndim > 1]


def is_frozen(module: nn.Module) -> bool:
    """Return whether a module has weight matrices (or kernels) and trains none of them."""
    matrices = _matrices(module)
    return bool(matrices) and not any(parameter.requires_grad for parameter in matrices)


def has_trained_batch_norm(module: nn.Module) -> bool:
    """Return whether a step moves the running statistics of any BatchNorm layer below a module."""
    synchronized = any(isinstance(layer, nn.SyncBatchNorm | GlobalBatchNorm) for layer in module.modules())
    return synchronized or any(not is_frozen(place.above) for place in batch_norms(module))


def _keep_statistics(layer: nn.Module, inputs: Any) -> None:
    layer.training = False  # `train()` of the whole student turned it on


def over_ranks(layer: _BatchNorm, device: str) -> nn.Module:
    """Return a layer with the same parameters that normalizes by the rows of all ranks."""
    if device.startswith("cuda"):
        from timm.layers.norm_act import convert_sync_batchnorm

        return convert_sync_batchnorm(layer)
    return GlobalBatchNorm(layer)


class GlobalBatchNorm(_BatchNorm):
    """BatchNorm over the rows of all ranks on any device, with parameters and buffers of another layer.

    torch's SyncBatchNorm is for GPUs alone.
    """

    def __init__(self, layer: _BatchNorm):
        super().__init__(
            layer.num_features, layer.eps, layer.momentum, layer.affine, layer.track_running_stats
        )
        self._parameters.update(layer._parameters)
        self._buffers.update(layer._buffers)
        self._modules.update(layer._modules)  # timm's BatchNormAct2d drops and activates in the same module
        self.train(layer.training)

    def _check_input_dim(self, values: Tensor) -> None:
        pass  # as the layer that it stands for takes

    def forward(self, values: Float[Tensor, "n channels *size"]) -> Float[Tensor, "n channels *size"]:
        """Normalize by mean and variance of the global batch, and move the running statistics."""
        if not self.training:
            return self._after(super().forward(values))
        dims = [0, *range(2, values.ndim)]
        x = values.float()
        count = _sum_over_ranks(x.new_tensor([x.numel() / x.shape[1]]))
        mean = _sum_over_ranks(x.sum(dims)) / count
        centered = x - _as_channels(mean, x)
        variance = _sum_over_ranks(centered.square().sum(dims)) / count
        self._move(mean.detach(), variance.detach() * count / (count - 1))
        scale = (variance + self.eps).rsqrt()
        scale = scale if self.weight is None else scale * self.weight
        y = centered * _as_channels(scale, x)
        y = y if self.bias is None else y + _as_channels(self.bias, x)
        return self._after(y.to(values.dtype))

    def _after(self, values: Tensor) -> Tensor:
        for module in self.children():
            values = module(values)
        return values

    @torch.no_grad()
    def _move(self, mean: Tensor, variance: Tensor) -> None:
        """Move the running statistics towards those of a batch."""
        if self.running_mean is None or self.running_var is None or self.num_batches_tracked is None:
            return
        self.num_batches_tracked.add_(1)
        momentum = 1 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
        self.running_mean.lerp_(mean.to(self.running_mean.dtype), momentum)
        self.running_var.lerp_(variance.to(self.running_var.dtype), momentum)


def _as_channels(vector: Tensor, like: Tensor) -> Tensor:
    return vector.reshape(1, -1, *[1] * (like.ndim - 2))


class _SumOverRanks(torch.autograd.Function):
    """Sum over ranks; the backward pass sums the gradients, as every rank's loss depends on every summand."""

    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:
        total = value.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        total = gradient.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        return total


def _sum_over_ranks(value: Tensor) -> Tensor:
    return _SumOverRanks.apply(value)
