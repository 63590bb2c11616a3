"""Two teachers: one of pictures alone with a dense field, one with a field per pair of a picture and a text."""

# --8<-- [start:imports]
import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from teachercache.cache.spec import Field, TeacherSpec
from teachercache.teachers.teacher import Entry, Inputs, Teacher
from visitor.strict import StrictModule

# --8<-- [end:imports]

# --8<-- [start:inputs]
GRID_SIDE, LENGTH = 4, 10
VIEW = {"size": [16, 16]}


def view(picture: Image.Image) -> Tensor:
    """Return a small picture as float32 [3, 16, 16] in [0, 1]."""
    pixels = np.asarray(picture.convert("RGB").resize((16, 16), Image.Resampling.BILINEAR), np.float32)
    return torch.from_numpy(pixels / 255).permute(2, 0, 1)


def tokenize(texts: list[str]) -> Tensor:
    """Return character codes [n, 10], padded with 0."""
    ids = torch.zeros(len(texts), LENGTH, dtype=torch.int64)
    for row, text in zip(ids, texts, strict=True):
        codes = [1 + ord(character) % 127 for character in text[:LENGTH]]
        row[: len(codes)] = torch.tensor(codes, dtype=torch.int64)
    return ids


# --8<-- [end:inputs]


# --8<-- [start:grid]
class Pool(StrictModule, nn.Module):
    """Average colors of a grid."""

    def __init__(self) -> None:
        super().__init__()
        self._pool = nn.AdaptiveAvgPool2d(GRID_SIDE)

    def forward(self, images: Tensor) -> Tensor:
        """Compute [n, 3, 4, 4]."""
        return self._pool(images)


def encode_grid(module: nn.Module, inputs: Inputs) -> dict[str, Tensor]:
    """Compute `grid` and a vector `color` of each distinct picture."""
    grid = module(inputs["image"])
    return {"grid": grid, "color": grid.mean((2, 3))}


def load_grid(name: str, *, weights: str, outputs: tuple[str, ...]) -> Teacher:
    """Load the teacher of pictures alone."""
    fields = (
        Field("grid", (3, GRID_SIDE, GRID_SIDE), "image", "float16", "average colors of a grid"),
        Field("color", (3,), "image", "float32", "average color"),
    )
    spec = TeacherSpec(
        name, weights, "grid-1", outputs, fields, view=VIEW, tokenizer={}, constants={}, inputs=("image",)
    )
    return Teacher(spec, Pool().eval(), encode_grid, view)


# --8<-- [end:grid]


# --8<-- [start:pairs]
class Affinity(StrictModule, nn.Module):
    """Compares the color of a picture with the characters of a text."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self._characters = nn.Embedding(128, 3)

    def forward(self, images: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Compute colors [images, 3] and text vectors [texts, 3]."""
        return images.mean((2, 3)), self._characters(ids).mean(1)


def encode_pairs(module: nn.Module, inputs: Inputs) -> dict[str, Tensor]:
    """Compute `affinity` of each pair, and the vectors that it is made of where there are pictures."""
    if "image" not in inputs or "text" not in inputs:
        return {}
    colors, texts = module(inputs["image"], inputs["text"])
    image, text = inputs["pair_image"].flatten(), inputs["pair_text"].flatten()
    return {"affinity": colors[image] * texts[text], "image_emb": colors, "text_emb": texts}


def load_pairs(name: str, *, weights: str, outputs: tuple[str, ...]) -> Teacher:
    """Load the teacher of pairs."""
    fields = (
        Field("image_emb", (3,), "image", "float32", "average color"),
        Field("text_emb", (3,), "text", "float32", "average character"),
        Field(
            "affinity", (3,), "pair", "float32", "product of color and characters", compare="relative_error"
        ),
    )
    spec = TeacherSpec(
        name,
        weights,
        "pairs-1",
        outputs,
        fields,
        view=VIEW,
        tokenizer={"characters": LENGTH},
        constants={},
        inputs=("image", "text", "pairs"),
    )
    return Teacher(spec, Affinity().eval().requires_grad_(False), encode_pairs, view, tokenize)


# --8<-- [end:pairs]


# --8<-- [start:entries]
GRID = Entry("average colors of a grid", load_grid, ("grid",), writes={"grid": "grid|color"})
PAIRS = Entry(
    "colors times characters", load_pairs, ("pairs",), writes={"pairs": "affinity|image_emb|text_emb"}
)
# --8<-- [end:entries]
