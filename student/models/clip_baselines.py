"""CLIP-TD's baselines: a few layers over frozen CLIP's cached embeddings (table 11), and CLIP tuned as a whole.

Nothing is distilled here. Not for CLIP without training: see `evaluation.models.cache_answerer`.
"""

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity

from student.models.logit_scale import LOG_SCALE_INIT
from student.models.two_tower.loading import build_two_tower
from student.models.two_tower.model import TwoTower
from teachercache.core.errors import UserError

HEADS = 8  # of the attention layer
ADAPTERS = ("clip-1-linear", "clip-3-linear", "clip-transformer")
TUNED = "clip-tuned"  # the row that the paper gives to CLIP-ViL: CLIP's towers trained with the task, pictures decoded


class Adapter(nn.Module):
    """Picture and text embedding, fused, to a score for each text of a row or to classes from its one text."""

    inputs = ("image_emb", "text_emb")

    def __init__(self, kind: str, fusion: str, widths: tuple[int, int], *, inputs: int, classes: int):
        super().__init__()
        self.kind, self.fusion, self.classes = kind, fusion, classes
        self.made = {
            "kind": kind,
            "fusion": fusion,
            "widths": list(widths),
            "inputs": inputs,
            "classes": classes,
        }
        width = widths[0]
        self.norm = nn.ModuleList(nn.LayerNorm(one) for one in widths)
        if kind == "clip-transformer":
            self.to_width = nn.Linear(widths[1], width)
            self.layer = nn.TransformerEncoderLayer(
                width, HEADS, 2 * width, batch_first=True, norm_first=True
            )
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


class TunedClip(nn.Module):
    """Both towers of a CLIP and a linear layer over their joined embeddings, all of them trained."""

    inputs = ("image", "pair_text")

    def __init__(self, clip: TwoTower, *, inputs: int, classes: int):
        super().__init__()
        self.clip, self.adapter = (
            clip,
            Adapter("clip-1-linear", "concat", clip.widths, inputs=inputs, classes=classes),
        )
        clip.model.logit_scale.requires_grad_(False)  # nothing here has a scale
        self.view, self.tokenizer = clip.view, clip.tokenizer

    def forward(self, batch: Mapping[str, Tensor]) -> dict[str, Float[Tensor, "n classes"]]:
        """`logits` of each row's answers."""
        image = self.clip.model.encode_image(batch["image"])
        text = self.clip.model.encode_text(batch["pair_text"].flatten(0, 1))
        return self.adapter({"image_emb": image, "text_emb": text.unflatten(0, batch["pair_text"].shape[:2])})

    def describe(self) -> dict[str, Any]:
        """What run.json keeps: enough to build it again."""
        clip = {"model_cfg": self.clip.model_cfg, "preprocess": self.clip.preprocess}
        return {"tuned": clip, "adapter": self.adapter.made}


def _linears(kind: str, width: int, out: int) -> nn.Module:
    """One linear layer, or three with ReLU between them."""
    if kind == "clip-1-linear":
        return nn.Linear(width, out)
    return nn.Sequential(
        nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, out)
    )


def build_adapter(
    name: str, fusion: str, widths: tuple[int, int], *, inputs: int, classes: int, init: str = ""
) -> Adapter | TunedClip:
    """The baseline of that name; UserError names those there are."""
    if name == TUNED:
        if not init:
            raise UserError(
                f"--set model={name}: it begins from a CLIP, add --set init=FOLDER (open_clip's form)"
            )
        return TunedClip(build_two_tower(name, init), inputs=inputs, classes=classes)
    if name not in ADAPTERS:
        names = ", ".join((*ADAPTERS, TUNED))
        raise UserError(f"--set model={name}: choose from {names}, or a uniter, vl-bert or villa")
    return Adapter(name, fusion, widths, inputs=inputs, classes=classes)
