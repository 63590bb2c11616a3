"""An encoder written by hand, and the same in numpy: what a task says of it can be computed in a slow loop."""

import numpy as np
import torch
from PIL import Image

from evaluation.models.encoder import Encoder

WIDTH, SIZE = 6, 8
RANDOM = np.random.default_rng(0)
IMAGE_MATRIX = RANDOM.normal(size=(3 * SIZE * SIZE, WIDTH))
LENGTH = 80  # characters of a text that count
TEXT_MATRIX = RANDOM.normal(size=(LENGTH, 128, WIDTH))  # place, character


def view(picture: Image.Image) -> torch.Tensor:
    pixels = np.asarray(picture.resize((SIZE, SIZE)), np.float32) / 255 - 0.5
    return torch.from_numpy(pixels).permute(2, 0, 1)


def tokenize(texts: list[str]) -> torch.Tensor:
    """Codes of the first LENGTH ASCII characters, zeros behind."""
    return torch.tensor([[*text[:LENGTH].encode("ascii"), *[0] * (LENGTH - len(text))] for text in texts])


ENCODER = Encoder(
    name="linear",
    pretrained="by hand",
    size=(SIZE, SIZE),
    view=view,
    tokenize=tokenize,
    encode_image=lambda images: images.flatten(1).double() @ torch.from_numpy(IMAGE_MATRIX),
    encode_text=lambda ids: torch.from_numpy(TEXT_MATRIX)[torch.arange(LENGTH), ids].sum(1),
)
# One unit vector for everything: its products are exact, so that all scores tie whatever the BLAS
CONSTANT = Encoder(
    **{
        **vars(ENCODER),
        "encode_image": lambda images: torch.eye(1, WIDTH).repeat(len(images), 1),
        "encode_text": lambda ids: torch.eye(1, WIDTH).repeat(len(ids), 1),
    }
)


def slow_image(path) -> np.ndarray:
    with Image.open(path) as picture:
        vector = view(picture.convert("RGB")).numpy().reshape(-1).astype(np.float64) @ IMAGE_MATRIX
    return vector / np.sqrt((vector**2).sum())


def slow_text(text: str) -> np.ndarray:
    codes = [ord(character) for character in text[:LENGTH]] + [0] * (LENGTH - len(text))
    vector = sum(TEXT_MATRIX[place, code] for place, code in enumerate(codes))
    return vector / np.sqrt((vector**2).sum())
