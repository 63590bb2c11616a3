"""CLIP-TD's baselines: layers on frozen CLIP's cached embeddings (table 11), and a finetuned CLIP.

The baselines use no distillation. `evaluation.models.cache_answerer` measures CLIP without training.
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

HEADS = 8  # attention heads
ADAPTERS = ("clip-1-linear", "clip-3-linear", "clip-transformer")
# The paper's CLIP-ViL row: CLIP's towers are trained on the task, with decoded pictures
TUNED = "clip-tuned"

LIMITS = {
    Capability.ENCODES: "run `student eval` with the task that it was trained on",
    Capability.EXPORTS_OPEN_CLIP: "it answers one task, which open_clip does not support",
    Capability.EXPORTS_HF: "it answers one task, for which transformers has no model",
}


class Adapter(nn.Module):
    """Layers from a picture and a text embedding to a score per text, or to classes for a single text.

    Args:
        kind: One of ADAPTERS.
        fusion: "concat" or "cosine".
        widths: Widths of the image and the text embedding.
        inputs: Texts per row.
        classes: Answers per row.
    """

    def __init__(self, kind: str, fusion: str, widths: tuple[int, int], *, inputs: int, classes: int):
        super().__init__()
        self.kind, self.fusion, self.classes = kind, fusion, classes
        self.arguments = {
            "kind": kind,
            "fusion": fusion,
            "widths": list(widths),
            "inputs": inputs,
            "classes": classes,
        }
        width = widths[0]
        self.norm = nn.ModuleList(nn.LayerNorm(size) for size in widths)
        if kind == "clip-transformer":
            self.to_width = nn.Linear(widths[1], width)
            self.layer = nn.TransformerEncoderLayer(
                width, HEADS, 2 * width, batch_first=True, norm_first=True
            )
            self.out: nn.Module = nn.Linear(width, 1 if inputs > 1 else classes)
        elif fusion == "cosine":
            self.image, self.text = (_linears(kind, size, width) for size in widths)
            self.logit_scale = nn.Parameter(torch.full((1,), LOG_SCALE_INIT))
            self.out = nn.Identity() if inputs > 1 else nn.Linear(1, classes)
        else:
            self.out = _linears(kind, sum(widths), 1 if inputs > 1 else classes)

    @property
    def spec(self) -> StudentSpec:
        """The arguments of the constructor, from which the adapter is built again."""
        return StudentSpec("clip_adapter", self.arguments)

    @property
    def row_inputs(self) -> RowInputs:
        """The cached embeddings."""
        return RowInputs(fields=("image_emb", "text_emb"))

    def capabilities(self) -> frozenset[Capability]:
        """Return the capability to answer, and those of training."""
        return frozenset({Capability.ANSWERS, Capability.COMPILES, Capability.SHARDS_PARAMETERS})

    def limits(self) -> dict[Capability, str]:
        """Return why it cannot encode or be exported."""
        return LIMITS

    def saved_state(self) -> dict[str, Tensor]:
        """Return the state dict."""
        return self.state_dict()

    def load_saved_state(self, state: Mapping[str, Tensor]) -> None:
        """Load a state dict."""
        self.load_state_dict(dict(state))

    def forward(self, batch: Mapping[str, Tensor]) -> dict[str, Float[Tensor, "n classes"]]:
        """Compute the `logits` of each row's answers.

        Args:
            batch: `image_emb` [n, d] and `text_emb` [n, C, e].
        """
        text = self.norm[1](batch["text_emb"])  # [n, C, e]
        image = self.norm[0](batch["image_emb"])[:, None].expand(-1, text.shape[1], -1)  # [n, C, d]
        if self.kind == "clip-transformer":
            pair = torch.stack([image, self.to_width(text)], 2).flatten(0, 1)  # [n C, 2, d]
            logits = self.out(self.layer(pair).mean(1))
        elif self.fusion == "cosine":
            cosine = cosine_similarity(self.image(image), self.text(text), dim=-1)
            logits = self.out((self.logit_scale.exp() * cosine).flatten()[:, None])
        else:
            logits = self.out(torch.cat([image, text], -1).flatten(0, 1))
        return {"logits": logits.reshape(len(text), self.classes)}


class TunedClip(nn.Module):
    """Both towers of a CLIP and a linear layer on their concatenated embeddings, all of them trained."""

    def __init__(self, clip: TwoTower, *, inputs: int, classes: int):
        super().__init__()
        self.clip = clip
        self.adapter = Adapter("clip-1-linear", "concat", clip.widths, inputs=inputs, classes=classes)
        clip.model.logit_scale.requires_grad_(False)  # unused: the logits have no scale

    @property
    def spec(self) -> StudentSpec:
        """CLIP's configuration and the adapter's arguments."""
        return StudentSpec("clip_tuned", {"clip": self.clip.spec.config, "adapter": self.adapter.arguments})

    @property
    def row_inputs(self) -> RowInputs:
        """The picture, and the tokens of each input."""
        return RowInputs(PictureView(self.clip.picture.view), self.clip.tokenizer)

    def capabilities(self) -> frozenset[Capability]:
        """Return the capability to answer, and those of training."""
        return frozenset({Capability.ANSWERS, Capability.COMPILES, Capability.SHARDS_PARAMETERS})

    def limits(self) -> dict[Capability, str]:
        """Return why it cannot encode or be exported."""
        return LIMITS

    def saved_state(self) -> dict[str, Tensor]:
        """Return the state dict."""
        return self.state_dict()

    def load_saved_state(self, state: Mapping[str, Tensor]) -> None:
        """Load a state dict."""
        self.load_state_dict(dict(state))

    def forward(self, batch: Mapping[str, Tensor]) -> dict[str, Float[Tensor, "n classes"]]:
        """Compute the `logits` of each row's answers.

        Args:
            batch: `image` [n, 3, H, W] and `pair_text` [n, C, length].
        """
        image = self.clip.model.encode_image(batch["image"])
        text = self.clip.model.encode_text(batch["pair_text"].flatten(0, 1))
        return self.adapter({"image_emb": image, "text_emb": text.unflatten(0, batch["pair_text"].shape[:2])})


def _linears(kind: str, width: int, out: int) -> nn.Module:
    """Return one linear layer, or three with ReLU between them."""
    if kind == "clip-1-linear":
        return nn.Linear(width, out)
    return nn.Sequential(
        nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, out)
    )


def build_adapter(
    name: str, fusion: str, widths: tuple[int, int], *, inputs: int, classes: int, init: str = ""
) -> Adapter | TunedClip:
    """Build a baseline by name.

    Args:
        name: One of ADAPTERS, or TUNED.
        fusion: "concat" or "cosine".
        widths: Widths of the image and the text embedding.
        inputs: Texts per row.
        classes: Answers per row.
        init: A CLIP in open_clip's form; required for TUNED.

    Raises:
        UserError: The name is unknown, or TUNED has no `init`.
    """
    if name == TUNED:
        if not init:
            raise UserError(
                f"--set model={name}: it starts from a CLIP: add --set init=FOLDER (open_clip's form)"
            )
        return TunedClip(build_two_tower(name, init), inputs=inputs, classes=classes)
    if name not in ADAPTERS:
        names = ", ".join((*ADAPTERS, TUNED))
        raise UserError(f"--set model={name}: choose from {names}, or a uniter, vl-bert or villa")
    return Adapter(name, fusion, widths, inputs=inputs, classes=classes)


def rebuild_adapter(config: Mapping[str, Any]) -> Adapter:
    """Return an adapter of a recorded configuration, with random weights."""
    image_width, text_width = config["widths"]
    sizes = {"inputs": config["inputs"], "classes": config["classes"]}
    return Adapter(config["kind"], config["fusion"], (image_width, text_width), **sizes)


def rebuild_tuned(config: Mapping[str, Any]) -> TunedClip:
    """Return a tuned CLIP of a recorded configuration, with random weights."""
    adapter = config["adapter"]
    return TunedClip(rebuild(config["clip"]), inputs=adapter["inputs"], classes=adapter["classes"])
