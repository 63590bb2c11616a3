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
    "text_states": Field("text_states", (LENGTH, WIDTH), "text", "float16", "the states of a text"),
    "latents": Field("latent", LATENT, "image", "float16", "the pixels of an image"),
    "unet_features": Field("unet_feature", LATENT, "pair", "float16", "the prediction of the UNet"),
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
    """The teacher; `unet_features` are the UNet's output at t = 500 with one noise for all pairs."""
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
        inputs=("image", "text", "pairs"),
    )

    def encode(module, inputs):
        fields = {}
        if "image" in inputs:
            fields["latent"] = encode_latent(module, inputs["image"])
        if "text" in inputs:
            fields["text_states"] = encode_states(module, inputs["text"])
        if "unet_features" in outputs and "pair_image" in inputs:
            latents = fields["latent"][inputs["pair_image"].flatten()]
            states = fields["text_states"][inputs["pair_text"].flatten()]
            t = torch.full((len(latents),), 500)
            noise = torch.randn(LATENT, generator=torch.Generator().manual_seed(0)).expand_as(latents)
            fields["unet_feature"] = predict_noise(module, add_noise(module, latents, noise, t), t, states)
        return {field.name: fields[field.name] for field in spec.fields if field.name in fields}

    return Teacher(spec, module, encode, image_view(view), tokenize)


DIFFUSION = Entry("random noise about noise", load, tuple(FIELDS))


# ----------------------------------------------------------------------------------------------------
# Teachers of one modality


def load_colors(name: str, *, weights: str, outputs: tuple[str, ...]) -> Teacher:
    """An image-only teacher: the mean of each channel, and a dense field, the image in 4 x 4 cells."""
    view = describe_view({"size": 8, "mean": [0.0] * 3, "std": [1.0] * 3, "resize_mode": "squash"})
    fields = (
        Field("color", (3,), "image", "float16", "mean of each channel"),
        Field("cells", (3, 4, 4), "image", "float16", "mean of each cell", dims=("channel", "y", "x")),
    )
    spec = TeacherSpec(name, weights, "1" * 64, outputs, fields, view, {}, {}, inputs=("image",))

    def encode(module, inputs):
        cells = nn.functional.avg_pool2d(inputs["image"], 2)
        return {"color": inputs["image"].mean((2, 3)), "cells": cells}

    return Teacher(spec, nn.Identity(), encode, view=image_view(view))


def load_letters(name: str, *, weights: str, outputs: tuple[str, ...]) -> Teacher:
    """A text-only teacher: how often each word id is in a text, plus one."""
    field = Field("counts", (64,), "text", "float16", "1 + the number of each id")
    spec = TeacherSpec(
        name, weights, "2" * 64, outputs, (field,), {}, {"name": "crc32"}, {}, inputs=("text",)
    )

    def encode(module, inputs):
        return {"counts": 1 + nn.functional.one_hot(inputs["text"], 64).sum(1).float()}

    return Teacher(spec, nn.Identity(), encode, tokenize=tokenize)


COLORS = Entry("mean colors of images", load_colors, writes={"embeddings": "color|cells"})
LETTERS = Entry("counts of words", load_letters, writes={"embeddings": "counts"})


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
