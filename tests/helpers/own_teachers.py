"""A tiny random diffusion model on pixels, for tests: `--teacher own-diffusion`, an entry point of the folder beside."""

import zlib
from types import SimpleNamespace

import torch
from torch import nn

from teachercache.cache.spec import Field, TeacherSpec
from teachercache.data.views import describe_view, image_view
from teachercache.teachers.diffusion.model import (
    Diffusion,
    add_noise,
    encode_latent,
    encode_states,
    predict_noise,
)
from teachercache.teachers.teacher import Entry, Teacher
from teachercache.teachers.weights import digest_weights

LATENT, LENGTH, WIDTH = (3, 8, 8), 6, 16
FIELDS = {
    "text_states": Field("text_states", (LENGTH, WIDTH), "text", "float16", "what the UNet reads of a text"),
    "latents": Field("latent", LATENT, "image", "float16", "what the UNet reads of a picture"),
    "unet_features": Field("unet_feature", LATENT, "text", "float16", "what the UNet says of both"),
}


class Words(nn.Module):
    """States of words without an encoder: a first output, as transformers' models have it."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(64, WIDTH)

    def forward(self, ids):
        return (self.table(ids),)


def tiny_unet() -> nn.Module:
    """50,000 parameters with cross-attention on the way down and up."""
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        sample_size=8,
        in_channels=3,
        out_channels=3,
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=WIDTH,
        attention_head_dim=4,
        norm_num_groups=4,
    )


def make_diffusion(prediction: str = "epsilon", unet: nn.Module | None = None) -> Diffusion:
    """The same random module in every process."""
    with torch.random.fork_rng():
        torch.manual_seed(11)
        unet = tiny_unet() if unet is None else unet
        words = Words()
    alphas = (1 - torch.linspace(1e-4, 0.02, 1000)).cumprod(0)  # DDPM's own
    return Diffusion(unet, None, words, alphas_cumprod=alphas, prediction=prediction)


def tokenize(texts: list[str]) -> torch.Tensor:
    """Ids by a checksum of each word, zeros behind them."""
    ids = torch.zeros(len(texts), LENGTH, dtype=torch.long)
    for i, text in enumerate(texts):
        for k, word in enumerate(text.split()[:LENGTH]):
            ids[i, k] = 1 + zlib.crc32(word.encode()) % 63
    return ids


def load(name: str, *, weights: str, outputs: tuple[str, ...]) -> Teacher:
    """The teacher; `unet_features` are what the UNet says at t = 500 of the picture with one noise for all."""
    module = make_diffusion()
    view = describe_view({"size": 8, "mean": [0.5] * 3, "std": [0.5] * 3, "resize_mode": "longest"})
    spec = TeacherSpec(
        name,
        weights,
        digest_weights(module),
        outputs,
        tuple(FIELDS[output] for output in outputs),
        view,
        {"name": "crc32"},
        {},
    )

    def encode(module, inputs):
        said = {}
        if "image" in inputs:
            said["latent"] = encode_latent(module, inputs["image"])
        if "text" in inputs:
            said["text_states"] = encode_states(module, inputs["text"])
        if "unet_features" in outputs:
            texts = len(said["text_states"]) // len(said["latent"])
            latents = said["latent"].repeat_interleave(texts, 0)
            t = torch.full((len(latents),), 500)
            noise = torch.randn(LATENT, generator=torch.Generator().manual_seed(0)).expand_as(latents)
            said["unet_feature"] = predict_noise(
                module, add_noise(module, latents, noise, t), t, said["text_states"]
            )
        return {field.name: said[field.name] for field in spec.fields if field.name in said}

    return Teacher(spec, module, encode, image_view(view), tokenize)


DIFFUSION = Entry("random noise about noise", load, tuple(FIELDS))


def random_matrix() -> torch.Tensor:
    """[192, 192] in float64, about as long as the identity."""
    return torch.randn(192, 192, generator=torch.Generator().manual_seed(4), dtype=torch.float64) / 14


class LinearUNet(nn.Module):
    """A UNet that is a matrix, or the identity: its Jacobian is known."""

    def __init__(self, matrix: torch.Tensor):
        super().__init__()
        self.matrix = nn.Parameter(matrix)
        self.config = SimpleNamespace(in_channels=LATENT[0], sample_size=LATENT[1])

    @property
    def dtype(self) -> torch.dtype:
        """As diffusers' models have it."""
        return self.matrix.dtype

    def forward(self, noised, t, encoder_hidden_states):
        return SimpleNamespace(sample=(noised.flatten(1) @ self.matrix.T).view_as(noised))
