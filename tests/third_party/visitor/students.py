"""Two students: one encodes pictures and texts, one chooses among answers."""

# --8<-- [start:imports]
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn

from evaluation.models.encoder import Encoder
from student.contract import (
    Capability,
    Exported,
    ExportRequest,
    Family,
    PictureView,
    RowInputs,
    StudentSpec,
)

# --8<-- [end:imports]

# --8<-- [start:inputs]
SIDE, LENGTH = 8, 12  # pixels, characters


def view(picture: Image.Image) -> Tensor:
    """Return a small picture as float32 [3, 8, 8] in [0, 1]."""
    pixels = np.asarray(picture.convert("RGB").resize((SIDE, SIDE), Image.Resampling.BILINEAR), np.float32)
    return torch.from_numpy(pixels / 255).permute(2, 0, 1)


def tokenize(texts: list[str]) -> Tensor:
    """Return character codes [n, 12], padded with 0."""
    ids = torch.zeros(len(texts), LENGTH, dtype=torch.int64)
    for row, text in zip(ids, texts, strict=True):
        codes = [1 + ord(character) % 127 for character in text[:LENGTH]]
        row[: len(codes)] = torch.tensor(codes, dtype=torch.int64)
    return ids


# --8<-- [end:inputs]


# --8<-- [start:two]
class Saved:
    """State dicts as they are."""

    def saved_state(self) -> dict[str, Tensor]:
        """Return the state dict."""
        return self.state_dict()  # type: ignore[attr-defined]

    def load_saved_state(self, state: Mapping[str, Tensor]) -> None:
        """Load a state dict."""
        self.load_state_dict(dict(state))  # type: ignore[attr-defined]


class Two(Saved, nn.Module):
    """A linear map of pixels and a mean of character embeddings."""

    def __init__(self, width: int, dropout: float = 0.0):
        super().__init__()
        self._width = width
        self._pixels = nn.Linear(3 * SIDE * SIDE, width)
        self._characters = nn.Embedding(128, width)
        self._dropout = nn.Dropout(dropout)
        self._log_scale = nn.Parameter(torch.full((1,), 2.0))

    @property
    def spec(self) -> StudentSpec:
        """The width, and a file of our own."""
        return StudentSpec("visitor_two", {"width": self._width}, {"visitor.txt": "hello\n"})

    @property
    def row_inputs(self) -> RowInputs:
        """A picture, a text, and a number for each."""
        return RowInputs(PictureView(view), tokenize, mask_noise=1)

    def forward(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Compute `image` and `text` [n, width] and the scalar `scale`."""
        pixels = batch["image"].flatten(1) * (1 + 0.01 * batch["mask_noise"])
        image = self._dropout(self._pixels(pixels))
        return {"image": image, "text": self._text(batch["text"]), "scale": self._log_scale.exp().reshape(())}

    def _text(self, ids: Tensor) -> Tensor:
        return self._characters(ids).mean(1)

    def capabilities(self) -> frozenset[Capability]:
        """Encoding and one kind of export."""
        return frozenset({Capability.ENCODES, Capability.EXPORTS_HF, Capability.SHARDS_PARAMETERS})

    def limits(self) -> dict[Capability, str]:
        """One reason; the others have none."""
        return {Capability.EXPORTS_OPEN_CLIP: "open_clip has no linear models"}

    def encoder(self, name: str, pretrained: str, device: str) -> Encoder:
        """Return pixels and characters as an Encoder."""
        self.to(device).eval()
        return Encoder(
            name=name,
            pretrained=pretrained,
            size=(SIDE, SIDE),
            view=view,
            tokenize=tokenize,
            encode_image=lambda images: self._pixels(images.flatten(1)),
            encode_text=self._text,
            device=device,
        )


# --8<-- [end:two]


# --8<-- [start:chooser]
class Chooser(Saved, nn.Module):
    """Scores each answer by the mean embedding of its sub-words and the picture's cached grid."""

    def __init__(self, words: int, grid: int, classes: int, inputs: int):
        super().__init__()
        self._sizes = {"words": words, "grid": grid, "classes": classes, "inputs": inputs}
        self._words, self._grid = nn.Embedding(words, 8), nn.Linear(grid, 8)
        self._score = nn.Linear(8, 1 if inputs > 1 else classes)

    @property
    def spec(self) -> StudentSpec:
        """The sizes."""
        return StudentSpec("visitor_chooser", self._sizes)

    @property
    def row_inputs(self) -> RowInputs:
        """Text pairs and the cached grid."""
        return RowInputs(text_pairs=True, fields=("grid",))

    def forward(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Compute `logits` [n, classes]."""
        mask = batch["attention_mask"].float().unsqueeze(-1)
        words = (self._words(batch["text"]) * mask).sum(2) / mask.sum(2)  # [n, C, 8]
        picture = self._grid(batch["grid"].flatten(1))[:, None]
        return {"logits": self._score(torch.tanh(words + picture)).flatten(1)}

    def capabilities(self) -> frozenset[Capability]:
        """Answering alone."""
        return frozenset({Capability.ANSWERS})

    def limits(self) -> dict[Capability, str]:
        """No reasons."""
        return {}


# --8<-- [end:chooser]


# --8<-- [start:family]
def build_two(config: Mapping[str, Any], folder: Path) -> Two:
    """Return a Two of a recorded configuration; its own file is in the folder."""
    assert (folder / "visitor.txt").read_text() == "hello\n"
    return Two(config["width"])


def export_two(student: Two, request: ExportRequest) -> Exported:
    """Write the weights and the configuration."""
    save_file(student.saved_state(), request.folder / "two.safetensors")
    (request.folder / "two.json").write_text(json.dumps(dict(student.spec.config)))
    return Exported("visitor", "visitor.load(...)", "visitor.load('{}')", ["a linear model"])


def build_chooser(config: Mapping[str, Any], folder: Path) -> Chooser:
    """Return a Chooser of a recorded configuration."""
    return Chooser(**config)


TWO, CHOOSER = Family(build_two, export_two), Family(build_chooser)
# --8<-- [end:family]
