"""A frozen diffusion UNet in a training step: Eq. 1's error with its gradient, rows at a time, and the memory it takes.

Not for what is cached (latents, text states), nor for losses: see `losses`.
"""

import weakref
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from student.losses import diffusion_loss
from teachercache.cache.disk_space import size
from teachercache.cache.store import Cache
from teachercache.core.device import pick_precision
from teachercache.core.errors import UserError
from teachercache.core.progress import say
from teachercache.teachers.diffusion.model import Diffusion, add_noise, diffusion_of, predict_noise
from teachercache.teachers.of_cache import load_teacher
from teachercache.teachers.teacher import Teacher

PRECISIONS = ("auto", "float32", "bfloat16")


def load_unet(cache: Cache, device: str, *, precision: str = "auto", checkpoint: bool = False) -> Teacher:
    """The cache's diffusion model on the device, its UNet alone; in bfloat16 where the device computes in it."""
    if precision not in PRECISIONS:
        raise UserError(f"--set unet_precision={precision}: choose from {', '.join(PRECISIONS)}")
    teacher = load_teacher(cache)
    module = diffusion_of(teacher)
    if module is None:
        raise UserError(
            f"{cache.path} is of {teacher.spec.name}, which has no UNet: pass a diffusion model's --cache"
        )
    module.vae = module.text_encoder = None  # what they say is cached
    dtype, reason = precision, "asked for"
    if precision == "auto":
        dtype, reason = pick_precision("auto", device)
        if dtype == "float16":
            dtype, reason = "float32", f"{reason}, and small gradients vanish in float16"
    module.eval().requires_grad_(False).to(device)
    nn.Module.to(module.unet, getattr(torch, dtype))  # diffusers' own warns of what it has nothing of
    if checkpoint:
        module.unet.enable_gradient_checkpointing()
    say(
        f"{teacher.spec.name}'s UNet: {num_weights(module.unet) / 1e6:,.1f}M parameters, frozen, {dtype} ({reason})"
    )
    return teacher


def num_weights(module: nn.Module) -> int:
    """Parameters of a module."""
    return sum(parameter.numel() for parameter in module.parameters())


# ----------------------------------------------------------------------------------------------------
# The error and its gradient


def diffusion_errors(
    module: Diffusion,
    latents: Float[Tensor, "n channels down across"],
    noise: Float[Tensor, "n channels down across"],
    t: Int[Tensor, " n"],
    states: Float[Tensor, "n length dim"],
    *,
    full: bool = True,
    micro: int = 0,
) -> Float[Tensor, " n"]:
    """Each row's ||eps_theta(z_t, t, c) - eps||^2, mean over elements; its gradient reaches `latents`.

    `full` is the gradient through the UNet; else the UNet's Jacobian is taken for the identity (DreamFusion), under the
    same value. A row's error depends on that row alone, so each `micro` rows (0: all) go forward and backward at once:
    only their activations are ever kept, and nothing is computed twice.
    """
    noised = add_noise(module, latents, noise, t)
    wanted = torch.is_grad_enabled() and noised.requires_grad
    rows = (part.split(micro or len(noised)) for part in (noised.detach(), noise, t, states))
    slope = _slope if wanted and full else _identity_slope
    found = [slope(module, *part) for part in zip(*rows, strict=True)]
    errors, slopes = (torch.cat(parts) for parts in zip(*found, strict=True))
    if not wanted:
        return errors
    change = noised - noised.detach()  # zero, and its gradient is the latents'
    return errors + (slopes * change).flatten(1).sum(1)


def _slope(
    module: Diffusion, noised: Tensor, noise: Tensor, t: Tensor, states: Tensor
) -> tuple[Tensor, Tensor]:
    """Errors of some rows, and their gradient with respect to what the UNet saw."""
    noised = noised.requires_grad_()
    errors = diffusion_loss(predict_noise(module, noised, t, states), noise)
    if not errors.requires_grad:
        raise RuntimeError(
            "the UNet predicted noise without a gradient: is it under no_grad or inference_mode?"
        )
    return errors.detach(), torch.autograd.grad(errors.sum(), noised)[0]


def _identity_slope(
    module: Diffusion, noised: Tensor, noise: Tensor, t: Tensor, states: Tensor
) -> tuple[Tensor, Tensor]:
    """The same with the identity for the UNet's Jacobian, which needs no backward."""
    with torch.no_grad():
        rest = predict_noise(module, noised, t, states) - noise
        return rest.square().flatten(1).mean(1), 2 * rest / rest[0].numel()


# ----------------------------------------------------------------------------------------------------
# Memory


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all tensors that live at a time, also of fake ones that have none."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.seen: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation and count what it made."""
        made = func(*args, **(kwargs or {}))
        for tensor in tree_flatten(made)[0]:
            if isinstance(tensor, Tensor):
                self.count(tensor.untyped_storage())
        return made

    def count(self, storage: Any) -> None:
        """From now on until it is freed."""
        key, size = storage._cdata, storage.nbytes()
        if key not in self.seen:
            self.seen.add(key)
            self.now += size
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._free, key, size)

    def _free(self, key: int, size: int) -> None:
        self.seen.discard(key)
        self.now -= size


class Probe(nn.Module):
    """A UNet's forward and the backward to its input as one call."""

    def __init__(self, unet: nn.Module):
        super().__init__()
        self.unet = unet

    def forward(self, noised: Tensor, t: Tensor, states: Tensor) -> Tensor:
        """The gradient with respect to what was noised."""
        said = self.unet(noised, t, encoder_hidden_states=states).sample
        return torch.autograd.grad(said.sum(), noised)[0]


def unet_bytes(
    unet: nn.Module, latent: Sequence[int], states: Sequence[int], *, rows: int, dtype: torch.dtype
) -> tuple[int, int]:
    """Bytes of the weights, and of all else at the peak of a forward and backward of so many rows; computes nothing.

    Fake tensors take the UNet's place, so it may lie on the meta device. A GPU's libraries need some space besides.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode

    probe = Probe(unet)
    with FakeTensorMode():
        weights = {name: torch.empty(value.shape, dtype=dtype) for name, value in probe.named_parameters()}
        weights |= {
            name: torch.empty(value.shape, dtype=value.dtype) for name, value in probe.named_buffers()
        }
        noised = torch.zeros(rows, *latent, dtype=dtype, requires_grad=True)
        inputs = noised, torch.zeros(rows, dtype=torch.int64), torch.zeros(rows, *states, dtype=dtype)
        with LiveBytes() as live, torch.enable_grad():
            torch.func.functional_call(probe, weights, inputs)
    return sum(value.numel() * value.element_size() for value in weights.values()), live.peak


def memory_words(teacher: Teacher, rows: int) -> str:
    """What a UNet that sees so many rows at a time needs, for a person."""
    unet, shapes = teacher.module.unet, (teacher.spec.field(name).shape for name in ("latent", "text_states"))
    weights, kept = unet_bytes(unet, *shapes, rows=rows, dtype=unet.dtype)
    return (
        f"{teacher.spec.name}'s UNet, by estimate: {size(weights)} of weights and {size(kept)} at the peak of "
        f"{rows} rows at a time: {size(weights + kept)} beside the student"
    )
