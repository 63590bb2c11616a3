"""CLIP-TD's baselines on frozen CLIP (table 11): a few layers over its cached embeddings. Nothing is distilled."""

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity

from student.models import LOG_SCALE_INIT
from teachercache.names import UserError

HEADS = 8  # of the attention layer
ADAPTERS = ("clip-1-linear", "clip-3-linear", "clip-transformer")


class Adapter(nn.Module):
    """Picture and text embedding, fused, to a score for each text of a row or to classes from its one text."""

    inputs = ("image_emb", "text_emb")

    def __init__(self, kind: str, fusion: str, widths: tuple[int, int], *, inputs: int, classes: int):
        super().__init__()
        self.kind, self.fusion, self.classes = kind, fusion, classes
        self.made = {"kind": kind, "fusion": fusion, "widths": list(widths), "inputs": inputs, "classes": classes}
        width = widths[0]
        self.norm = nn.ModuleList(nn.LayerNorm(one) for one in widths)
        if kind == "clip-transformer":
            self.to_width = nn.Linear(widths[1], width)
            self.layer = nn.TransformerEncoderLayer(width, HEADS, 2 * width, batch_first=True, norm_first=True)
            self.out = nn.Linear(width, 1 if inputs > 1 else classes)
        elif fusion == "cosine":
            self.image, self.text = (_linears(kind, one, width) for one in widths)
            self.logit_scale = nn.Parameter(torch.full((1,), LOG_SCALE_INIT))
            self.out = nn.Identity() if inputs > 1 else nn.Linear(1, classes)
        else:
            self.out = _linears(kind, sum(widths), 1 if inputs > 1 else classes)

    def forward(self, batch: Mapping[str, Tensor]) -> dict[str, Float[Tensor, "n classes"]]:
        """`logits` of each row's answers."""
        text = self.norm[1](batch["text_emb"])  # [n, C, e]
        image = self.norm[0](batch["image_emb"])[:, None].expand(-1, text.shape[1], -1)  # [n, C, d]
        if self.kind == "clip-transformer":
            pair = torch.stack([image, self.to_width(text)], 2).flatten(0, 1)  # [n C, 2, d]
            found = self.out(self.layer(pair).mean(1))
        elif self.fusion == "cosine":
            near = cosine_similarity(self.image(image), self.text(text), dim=-1)
            found = self.out((self.logit_scale.exp() * near).flatten()[:, None])
        else:
            found = self.out(torch.cat([image, text], -1).flatten(0, 1))
        return {"logits": found.reshape(len(text), self.classes)}

    def describe(self) -> dict[str, Any]:
        """What run.json keeps: enough to build it again."""
        return {"adapter": self.made}


def _linears(kind: str, width: int, out: int) -> nn.Module:
    """One linear layer, or three with ReLU between them."""
    if kind == "clip-1-linear":
        return nn.Linear(width, out)
    return nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, out))


def build_adapter(name: str, fusion: str, widths: tuple[int, int], *, inputs: int, classes: int) -> Adapter:
    """The baseline of that name; UserError names those there are."""
    if name not in ADAPTERS:
        raise UserError(f"--set model={name}: choose from {', '.join(ADAPTERS)}, or a uniter, vl-bert or villa")
    return Adapter(name, fusion, widths, inputs=inputs, classes=classes)
