"""A text-to-image diffusion model as a teacher: latents, text states, noise, and the error of Eq. 1 of
SDS-CLIP.

    d(x, c) = E_{t, eps} || eps_theta(z_t, t, c) - eps ||^2,    z_t = sqrt(abar_t) v(x) + sqrt(1 - abar_t)
        eps

Plain functions of a frozen module; the caller decides about gradients. `loading.py` reads folders.
"""

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from teachercache.teachers.teacher import Teacher

PREDICTIONS = ("epsilon", "v_prediction")
PAIRS_AT_ONCE = 64  # per pass through the UNet, so that its memory does not depend on the number of texts


class Diffusion(nn.Module):
    """The frozen UNet, text encoder and VAE (none for a model on pixels) of a Stable-Diffusion-style
    pipeline.
    """

    alphas_cumprod: Float[Tensor, " timesteps"]

    def __init__(
        self,
        unet: Any,
        vae: Any,
        text_encoder: Any,
        *,
        alphas_cumprod: Float[Tensor, " timesteps"],
        prediction: str,
    ):
        super().__init__()
        if prediction not in PREDICTIONS:
            raise ValueError(f"prediction is {' or '.join(PREDICTIONS)}, not {prediction!r}")
        self.unet, self.vae, self.text_encoder, self.prediction = unet, vae, text_encoder, prediction
        self.scaling: float = 1.0 if vae is None else float(vae.config.scaling_factor)  # of latents
        self.register_buffer("alphas_cumprod", alphas_cumprod.float())
        self.eval().requires_grad_(False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Diffusion":
        """Move the module; the noise schedule stays in float32, as half precision is too coarse for it."""
        exact = self.alphas_cumprod
        super()._apply(fn, recurse)
        self.alphas_cumprod = exact.to(self.alphas_cumprod.device)
        return self


def diffusion_of(teacher: Teacher) -> Diffusion | None:
    """Return the module of a diffusion teacher, or None for another teacher."""
    return teacher.module if isinstance(teacher.module, Diffusion) else None


def latent_shape(module: Diffusion) -> tuple[int, int, int]:
    """Return channels, height and width of the latents that the UNet was trained on."""
    size = module.unet.config.sample_size
    height, width = (size, size) if isinstance(size, int) else size
    return int(module.unet.config.in_channels), int(height), int(width)


def encode_latent(
    module: Diffusion, images: Float[Tensor, "rows 3 height width"]
) -> Float[Tensor, "rows channels down across"]:
    """Map images in [-1, 1] to the mean of the VAE's posterior times `scaling`; without a VAE they are the
    latents.
    """
    if module.vae is None:
        return images
    return module.vae.encode(images.to(module.vae.dtype)).latent_dist.mode() * module.scaling


def encode_states(module: Diffusion, ids: Int[Tensor, "texts length"]) -> Float[Tensor, "texts length dim"]:
    """Return the text states that the UNet reads: the last hidden states, with padding and final norm."""
    return module.text_encoder(ids)[0]


def _shares(module: Diffusion, t: Int[Tensor, " rows"], like: Tensor) -> tuple[Tensor, Tensor]:
    """Return sqrt(abar_t) and sqrt(1 - abar_t) in float32, broadcastable to `like`."""
    abar = module.alphas_cumprod[t.to(module.alphas_cumprod.device)].to(like.device)
    abar = abar.view(-1, *[1] * (like.ndim - 1))
    return abar.sqrt(), (1 - abar).sqrt()


def add_noise(
    module: Diffusion,
    latents: Float[Tensor, "rows channels down across"],
    noise: Float[Tensor, "rows channels down across"],
    t: Int[Tensor, " rows"],
) -> Float[Tensor, "rows channels down across"]:
    """Compute z_t = sqrt(abar_t) z + sqrt(1 - abar_t) eps in float32, and return it in the dtype of
    `latents`.
    """
    signal, rest = _shares(module, t, latents)
    return (signal * latents + rest * noise).to(latents.dtype)


def predict_noise(
    module: Diffusion,
    noised: Float[Tensor, "rows channels down across"],
    t: Int[Tensor, " rows"],
    states: Float[Tensor, "rows length dim"],
) -> Float[Tensor, "rows channels down across"]:
    """Return eps_theta(z_t, t, c) in the dtype of `noised`. A v prediction becomes sqrt(abar) v + sqrt(1 -
    abar) z.
    """
    dtype = module.unet.dtype
    output = module.unet(noised.to(dtype), t.to(noised.device), encoder_hidden_states=states.to(dtype)).sample
    if module.prediction == "v_prediction":
        signal, rest = _shares(module, t, noised)
        output = signal * output + rest * noised
    return output.to(noised.dtype)


def draw_noise(
    module: Diffusion, num: int, *, seed: int = 0, t_range: tuple[int, int] | None = None
) -> tuple[Int[Tensor, " draws"], Float[Tensor, "draws channels down across"]]:
    """Draw `num` pairs of (t, eps) that are equal on every device and for every batch.

    Each of `num` equal parts of the range gives one t: their mean has less variance than free draws. A CPU
    generator draws in float32.

    Args:
        module: The diffusion model.
        num: The number of draws.
        seed: The seed.
        t_range: [first, last + 1); all timesteps by default.
    """
    first, last = t_range or (0, len(module.alphas_cumprod))
    if not 0 <= first < last <= len(module.alphas_cumprod) or num < 1:
        raise ValueError(
            f"{num} draws of t within {first} and {last}: of {len(module.alphas_cumprod)} timesteps"
        )
    generator = torch.Generator().manual_seed(seed)
    within = (torch.arange(num) + torch.rand(num, generator=generator, dtype=torch.float64)) / num
    t = (first + within * (last - first)).long().clamp(max=last - 1)
    noise = torch.randn(num, *latent_shape(module), generator=generator)
    device = module.alphas_cumprod.device
    return t.to(device), noise.to(device)


def pair_errors(
    module: Diffusion,
    latents: Float[Tensor, "rows channels down across"],
    states: Float[Tensor, "rows texts length dim"],
    t: Int[Tensor, " draws"],
    noise: Float[Tensor, "draws channels down across"],
) -> Float[Tensor, "rows texts"]:
    """Compute d(x, c) of Eq. 1 for every text of every row: the mean over draws and elements, in float32."""
    rows, texts = states.shape[:2]
    owners = torch.arange(rows, device=latents.device).repeat_interleave(texts)
    pairs = zip(owners.split(PAIRS_AT_ONCE), states.flatten(0, 1).split(PAIRS_AT_ONCE), strict=True)
    errors = []
    for places, text_states in pairs:
        total = torch.zeros(len(places), device=latents.device)
        for draw, eps in zip(t, noise.float(), strict=True):
            timesteps, eps = draw.expand(len(places)), eps.expand(len(places), *eps.shape)
            noised = add_noise(module, latents[places].float(), eps, timesteps)
            total = total + (predict_noise(module, noised, timesteps, text_states) - eps).square().flatten(
                1
            ).mean(1)
        errors.append(total / len(t))
    return torch.cat(errors).view(rows, texts)
