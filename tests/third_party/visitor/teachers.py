"""Two teachers: one of pictures alone with a dense field, one with a field per pair of a picture and a text."""

# --8<-- [start:imports]
from functools import partial

import torch
from torch import Tensor, nn

from teachercache.cache.spec import Field, TeacherSpec
from teachercache.core.errors import UserError
from teachercache.data.views import describe_view, image_view
from teachercache.teachers.teacher import Entry, Inputs, Teacher
from teachercache.teachers.weights import digest_weights, random_seed

# --8<-- [end:imports]

# --8<-- [start:inputs]
GRID_SIDE, LENGTH = 4, 10
VIEW = describe_view({"size": 16, "mean": (0, 0, 0), "std": (1, 1, 1)})


def tokenize(texts: list[str]) -> Tensor:
    """Return character codes [n, 10], padded with 0."""
    ids = torch.zeros(len(texts), LENGTH, dtype=torch.int64)
    for row, text in zip(ids, texts, strict=True):
        codes = [1 + ord(character) % 127 for character in text[:LENGTH]]
        row[: len(codes)] = torch.tensor(codes, dtype=torch.int64)
    return ids


# --8<-- [end:inputs]


# --8<-- [start:grid]
class Pool(nn.Module):
    """Average colors of a grid."""

    def __init__(self) -> None:
        super().__init__()
        self._pool = nn.AdaptiveAvgPool2d(GRID_SIDE)

    def forward(self, images: Tensor) -> Tensor:
        """Compute [n, 3, 4, 4]."""
        return self._pool(images)


def encode_grid(module: nn.Module, inputs: Inputs, *, outputs: tuple[str, ...]) -> dict[str, Tensor]:
    """Compute the chosen fields of each distinct picture: `grid`, and its mean `color`."""
    grid = module(inputs["image"])
    fields = {"grid": grid, "color": grid.mean((2, 3))}
    return {name: fields[name] for name in outputs}


def load_grid(name: str, *, weights: str, outputs: tuple[str, ...]) -> Teacher:
    """Load the teacher of pictures alone, with the fields of the chosen outputs."""
    if weights != "pretrained":
        raise UserError(f"--weights {weights}: {name} has no weights; leave --weights out")
    fields = {
        "grid": Field("grid", (3, GRID_SIDE, GRID_SIDE), "image", "float16", "average colors of a grid"),
        "color": Field("color", (3,), "image", "float32", "average color"),
    }
    spec = TeacherSpec(
        name,
        weights,
        "grid-1",
        outputs,
        tuple(fields[output] for output in outputs),
        view=VIEW,
        tokenizer={},
        constants={},
        inputs=("image",),
    )
    return Teacher(spec, Pool().eval(), partial(encode_grid, outputs=outputs), image_view(VIEW))


# --8<-- [end:grid]


# --8<-- [start:pairs]
class Affinity(nn.Module):
    """Maps characters into the space of colors."""

    def __init__(self) -> None:
        super().__init__()
        self._characters = nn.Embedding(128, 3)

    def forward(self, ids: Tensor) -> Tensor:
        """Compute text vectors [texts, 3]."""
        return self._characters(ids).mean(1)


def encode_pairs(module: nn.Module, inputs: Inputs) -> dict[str, Tensor]:
    """Compute vectors of pictures and of texts, and `affinity` of each pair, as far as the inputs allow."""
    fields: dict[str, Tensor] = {}
    if "image" in inputs:
        fields["image_emb"] = inputs["image"].mean((2, 3))
    if "text" in inputs:
        fields["text_emb"] = module(inputs["text"])
    if "pair_image" in inputs:
        image, text = inputs["pair_image"].flatten(), inputs["pair_text"].flatten()
        fields["affinity"] = fields["image_emb"][image] * fields["text_emb"][text]
    return fields


def load_pairs(name: str, *, weights: str, outputs: tuple[str, ...]) -> Teacher:
    """Load the teacher of pairs: "pretrained" is seed 0, `random:SEED` any other."""
    seed = 0 if weights == "pretrained" else random_seed(weights)
    if seed is None:
        raise UserError(f"--weights {weights}: {name} has the weights pretrained and random:SEED")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        module = Affinity().eval().requires_grad_(False)
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
        digest_weights(module),
        outputs,
        fields,
        view=VIEW,
        tokenizer={"characters": LENGTH},
        constants={},
        inputs=("image", "text", "pairs"),
    )
    return Teacher(spec, module, encode_pairs, image_view(VIEW), tokenize)


# --8<-- [end:pairs]


# --8<-- [start:entries]
GRID = Entry(
    "average colors of a grid",
    load_grid,
    outputs=("grid", "color"),
    default=2,
    writes={"grid": "grid", "color": "color"},
)
PAIRS = Entry(
    "colors times characters",
    load_pairs,
    outputs=("pairs",),
    writes={"pairs": "affinity|image_emb|text_emb"},
)
# --8<-- [end:entries]
