"""Run a frozen diffusion UNet in a training step, with its denoising error, gradient and memory.

Latents and text states come from a cache; the losses are in `student.losses`.
"""

import weakref
from collections.abc import Sequence
from typing import Any, cast

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
    """Load the UNet of the diffusion model that built a cache, frozen.

    Args:
        cache: A cache of a diffusion model's outputs.
        device: Where the UNet runs.
        precision: One of PRECISIONS; "auto" takes bfloat16 where the device supports it.
        checkpoint: Recompute activations in backward.

    Returns:
        The teacher; of its module only the UNet is loaded to the device.

    Raises:
        UserError: The precision is unknown, or the cache's teacher has no UNet.
    """
    if precision not in PRECISIONS:
        raise UserError(f"--set unet_precision={precision}: choose from {', '.join(PRECISIONS)}")
    teacher = load_teacher(cache)
    module = diffusion_of(teacher)
    if module is None:
        raise UserError(
            f"{cache.path} was built by {teacher.spec.name}, which has no UNet: pass a diffusion model's --cache"
        )
    module.vae = module.text_encoder = None  # their outputs are cached
    dtype, reason = precision, "as requested"
    if precision == "auto":
        dtype, reason, _ = pick_precision("auto", device)
        if dtype == "float16":
            dtype, reason = "float32", f"{reason}, and small gradients vanish in float16"
    module.eval().requires_grad_(False).to(device)
    # diffusers' own `to` prints warnings that do not apply here
    nn.Module.to(module.unet, getattr(torch, dtype))
    if checkpoint:
        module.unet.enable_gradient_checkpointing()
    say(
        f"{teacher.spec.name}'s UNet: {num_weights(module.unet) / 1e6:,.1f}M parameters, frozen, {dtype} ({reason})"
    )
    return teacher


def num_weights(module: nn.Module) -> int:
    """Return the number of parameters of a module."""
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
    """Compute each row's ||eps_theta(z_t, t, c) - eps||^2, mean over elements (Eq. 1).

    Gradients reach `latents`. A row's error depends on that row alone. So each micro-batch goes through
    forward and backward at once, only its activations are kept, and nothing is computed twice.

    Args:
        module: The diffusion model.
        latents: z_0.
        noise: eps.
        t: The timestep of each row.
        states: c, the text states.
        full: Backpropagate through the UNet. False replaces the UNet's Jacobian by the identity
            (DreamFusion); the value is the same.
        micro: Rows per micro-batch; 0 for all.
    """
    noised = add_noise(module, latents, noise, t)
    needs_gradient = torch.is_grad_enabled() and noised.requires_grad
    inputs = (tensor.split(micro or len(noised)) for tensor in (noised.detach(), noise, t, states))
    compute = _errors_and_gradient if needs_gradient and full else _errors_and_identity_gradient
    results = [compute(module, *rows) for rows in zip(*inputs, strict=True)]
    errors, gradients = (torch.cat(blocks) for blocks in zip(*results, strict=True))
    if not needs_gradient:
        return errors
    zero = noised - noised.detach()  # its value is 0, its gradient is that of the latents
    return errors + (gradients * zero).flatten(1).sum(1)


def _errors_and_gradient(
    module: Diffusion, noised: Tensor, noise: Tensor, t: Tensor, states: Tensor
) -> tuple[Tensor, Tensor]:
    """Compute the errors of some rows and their gradient with respect to the noised latents."""
    noised = noised.requires_grad_()
    errors = diffusion_loss(predict_noise(module, noised, t, states), noise)
    if not errors.requires_grad:
        raise RuntimeError(
            "the UNet predicted noise without a gradient: is it under no_grad or inference_mode?"
        )
    return errors.detach(), torch.autograd.grad(errors.sum(), noised)[0]


def _errors_and_identity_gradient(
    module: Diffusion, noised: Tensor, noise: Tensor, t: Tensor, states: Tensor
) -> tuple[Tensor, Tensor]:
    """Compute the same with the identity as the UNet's Jacobian, which needs no backward pass."""
    with torch.no_grad():
        difference = predict_noise(module, noised, t, states) - noise
        return difference.square().flatten(1).mean(1), 2 * difference / difference[0].numel()


# ----------------------------------------------------------------------------------------------------
# Memory


class LiveBytes(TorchDispatchMode):
    """Count the bytes of all live tensors and their peak, also for fake tensors without storage."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.seen: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation and count its outputs."""
        outputs = func(*args, **(kwargs or {}))
        for tensor in tree_flatten(outputs)[0]:
            if isinstance(tensor, Tensor):
                self.count(tensor.untyped_storage())
        return outputs

    def count(self, storage: torch.UntypedStorage) -> None:
        """Count a storage from now on until it is freed."""
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
    """The forward pass of a UNet and the backward pass to its input, as one module."""

    def __init__(self, unet: nn.Module):
        super().__init__()
        self.unet = unet

    def forward(self, noised: Tensor, t: Tensor, states: Tensor) -> Tensor:
        """Compute the gradient of the summed output with respect to `noised`."""
        predicted = self.unet(noised, t, encoder_hidden_states=states).sample
        return torch.autograd.grad(predicted.sum(), noised)[0]


def unet_bytes(
    unet: nn.Module, latent: Sequence[int], states: Sequence[int], *, rows: int, dtype: torch.dtype
) -> tuple[int, int]:
    """Estimate the memory of a UNet's forward and backward pass with fake tensors.

    The UNet may be on the meta device. The estimate leaves out the workspace of a GPU's libraries.

    Args:
        unet: The UNet.
        latent: The shape of a latent.
        states: The shape of a text's states.
        rows: Rows per forward pass.
        dtype: The dtype of weights and inputs.

    Returns:
        Bytes of the weights, and bytes of everything else at the peak.
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
    """Return a sentence with the estimated memory of a UNet that runs `rows` rows at a time."""
    unet = cast(Diffusion, teacher.module).unet
    latent, states = (teacher.spec.field(name).shape for name in ("latent", "text_states"))
    weights, peak = unet_bytes(unet, latent, states, rows=rows, dtype=unet.dtype)
    return (
        f"{teacher.spec.name}'s UNet, by estimate: {size(weights)} of weights and {size(peak)} at the peak of "
        f"{rows} rows at a time: {size(weights + peak)} in addition to the student"
    )
