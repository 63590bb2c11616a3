"""CLIP-TD's baselines: a few layers over frozen CLIP's cached embeddings (table 11), and CLIP tuned as a whole.

Nothing is distilled here. Not for CLIP without training: see `evaluation.models.cache_answerer`.
"""

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity

from student.contract import Capability, PictureView, RowInputs, StudentSpec
from student.models.logit_scale import LOG_SCALE_INIT
from student.models.two_tower.loading import build_two_tower, rebuild
from student.models.two_tower.model import TwoTower
from teachercache.core.errors import UserError

HEADS = 8  # of the attention layer
ADAPTERS = ("clip-1-linear", "clip-3-linear", "clip-transformer")
TUNED = "clip-tuned"  # the row that the paper gives to CLIP-ViL: CLIP's towers trained with the task, pictures decoded

LIMITS = {
    Capability.ENCODES: "`student eval` takes it with the task that it was trained on",
    Capability.EXPORTS_OPEN_CLIP: "it answers one task, which open_clip has no place for",
    Capability.EXPORTS_HF: "it answers one task, which transformers has no model for",
}


class Adapter(nn.Module):
    """Picture and text embedding, fused, to a score for each text of a row or to classes from its one text."""

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

    @property
    def spec(self) -> StudentSpec:
        """The arguments of the constructor."""
        return StudentSpec("clip_adapter", self.made)

    @property
    def row_inputs(self) -> RowInputs:
        """Cached embeddings alone."""
        return RowInputs(fields=("image_emb", "text_emb"))

    def capabilities(self) -> frozenset[Capability]:
        """Answering alone."""
        return frozenset({Capability.ANSWERS, Capability.COMPILES, Capability.SHARDS_PARAMETERS})

    def limits(self) -> dict[Capability, str]:
        """It is a head on another model's embeddings."""
        return LIMITS

    def saved_state(self) -> dict[str, Tensor]:
        """Return the state dict."""
        return self.state_dict()

    def load_saved_state(self, state: Mapping[str, Tensor]) -> None:
        """Load a state dict."""
        self.load_state_dict(dict(state))

    def forward(self, batch: Mapping[str, Tensor]) -> dict[str, Float[Tensor, "n classes"]]:
        """Compute `logits` of each row's answers."""
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


class TunedClip(nn.Module):
    """Both towers of a CLIP and a linear layer over their joined embeddings, all of them trained."""

    def __init__(self, clip: TwoTower, *, inputs: int, classes: int):
        super().__init__()
        self.clip, self.adapter = (
            clip,
            Adapter("clip-1-linear", "concat", clip.widths, inputs=inputs, classes=classes),
        )
        clip.model.logit_scale.requires_grad_(False)  # nothing here has a scale

    @property
    def spec(self) -> StudentSpec:
        """CLIP's configuration and the adapter's arguments."""
        return StudentSpec("clip_tuned", {"clip": self.clip.spec.config, "adapter": self.adapter.made})

    @property
    def row_inputs(self) -> RowInputs:
        """Pictures as pixels, and each input as CLIP's tokens."""
        return RowInputs(PictureView(self.clip.picture.view), self.clip.tokenizer)

    def capabilities(self) -> frozenset[Capability]:
        """Answering alone."""
        return frozenset({Capability.ANSWERS, Capability.COMPILES, Capability.SHARDS_PARAMETERS})

    def limits(self) -> dict[Capability, str]:
        """Its towers were tuned for one task."""
        return LIMITS

    def saved_state(self) -> dict[str, Tensor]:
        """Return the state dict."""
        return self.state_dict()

    def load_saved_state(self, state: Mapping[str, Tensor]) -> None:
        """Load a state dict."""
        self.load_state_dict(dict(state))

    def forward(self, batch: Mapping[str, Tensor]) -> dict[str, Float[Tensor, "n classes"]]:
        """Compute `logits` of each row's answers."""
        image = self.clip.model.encode_image(batch["image"])
        text = self.clip.model.encode_text(batch["pair_text"].flatten(0, 1))
        return self.adapter({"image_emb": image, "text_emb": text.unflatten(0, batch["pair_text"].shape[:2])})


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


def rebuild_adapter(made: Mapping[str, Any]) -> Adapter:
    """Return an adapter of a recorded configuration, with random weights."""
    sizes = {"inputs": made["inputs"], "classes": made["classes"]}
    return Adapter(made["kind"], made["fusion"], tuple(made["widths"]), **sizes)


def rebuild_tuned(config: Mapping[str, Any]) -> TunedClip:
    """Return a tuned CLIP of a recorded configuration, with random weights."""
    adapter = config["adapter"]
    return TunedClip(rebuild(config["clip"]), inputs=adapter["inputs"], classes=adapter["classes"])
