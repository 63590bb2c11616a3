"""Two-tower students: any open_clip configuration, from scratch or from a folder; tiny ones for laptops.

The output embeddings are raw (not normalised). Not for losses: see `recipes/`.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import open_clip
import torch
from jaxtyping import Float
from open_clip.tokenizer import HFTokenizer
from torch import Tensor, nn

from teachercache.names import UserError, closest
from teachercache.runtime import say
from teachercache.teachers.clip import build_module, open_folder
from teachercache.views import describe_view, image_view, replay_view

WHITE_64 = {
    "mean": [0.5] * 3,
    "std": [0.5] * 3,
    "interpolation": "bicubic",
    "resize_mode": "longest",
    "fill_color": 255,
}

TINY: dict[str, dict[str, Any]] = {
    "vit-tiny": {
        "embed_dim": 512,
        "vision_cfg": {"image_size": 64, "layers": 4, "width": 256, "head_width": 64, "patch_size": 16},
        "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 192, "heads": 4, "layers": 2},
    },
    "vit-micro": {
        "embed_dim": 64,
        "vision_cfg": {"image_size": 32, "layers": 1, "width": 64, "head_width": 32, "patch_size": 8},
        "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 64, "heads": 2, "layers": 1},
    },
}


class TwoTower(nn.Module):
    """An open_clip model behind one `forward`, so that every ZeRO stage sees all its parameters used there."""

    inputs = ("image", "text")

    def __init__(self, model: nn.Module, model_cfg: Mapping[str, Any], preprocess: Mapping[str, Any], tokenizer: Any):
        super().__init__()
        model.logit_scale = nn.Parameter(model.logit_scale.detach().reshape(1))  # DeepSpeed refuses 0 dimensions
        self.model = model
        self.model_cfg, self.preprocess, self.tokenizer = model_cfg, preprocess, tokenizer
        described = describe_view(preprocess)
        self.view, self.replay, self.at_least = image_view(described), replay_view(described), described["at_least"]

    def forward(self, batch: Mapping[str, Tensor]) -> dict[str, Float[Tensor, "..."]]:
        """Pictures [n, 3, H, W] and token ids [n, length] to raw `image`, `text` [n, d] and `scale` [1]."""
        return {
            "image": self.model.encode_image(batch["image"]),
            "text": self.model.encode_text(batch["text"]),
            "scale": self.model.logit_scale.exp(),
        }

    @property
    def widths(self) -> tuple[int, int]:
        """Widths of the image and the text embedding."""
        return self.model_cfg["embed_dim"], self.model_cfg["embed_dim"]


def build_two_tower(name: str, init: str = "") -> TwoTower:
    """A student by configuration name, or from `init`, an exported folder whose configuration then counts."""
    if init:
        if not Path(init).is_dir():
            raise UserError(f"--set init={init}: no such folder; it takes what `student export` wrote")
        say(f"starting from {init}: its configuration counts, not model={name}")
        model, preprocess = open_folder(init)
        model_cfg = json.loads(Path(init, "open_clip_config.json").read_text())["model_cfg"]
        return TwoTower(model, model_cfg, preprocess, tokenizer_of(model_cfg, init))
    model_cfg = TINY.get(name) or open_clip.get_model_config(name)
    if model_cfg is None:
        names = [*TINY, *open_clip.list_models()]
        raise UserError(f"--set model={name}: {closest(name, names)}choose {', '.join(TINY)} or an open_clip model")
    model, preprocess = build_module(model_cfg, WHITE_64 if name in TINY else {})
    return TwoTower(model, model_cfg, preprocess, tokenizer_of(model_cfg))


def tokenizer_of(model_cfg: Mapping[str, Any], folder: str = "") -> Any:
    """The tokenizer that a configuration names: CLIP's own, or a Hugging Face one (its files are in `folder`)."""
    text_cfg = model_cfg["text_cfg"]
    length, options = text_cfg.get("context_length", 77), text_cfg.get("tokenizer_kwargs", {})
    if "hf_tokenizer_name" not in text_cfg:
        return open_clip.SimpleTokenizer(context_length=length, **options)
    source = folder if folder and Path(folder, "tokenizer_config.json").exists() else text_cfg["hf_tokenizer_name"]
    return HFTokenizer(source, context_length=length, tokenizer_mode=text_cfg.get("tokenizer_mode"), **options)


def open_clip_state(student: TwoTower) -> dict[str, Tensor]:
    """The state dict that open_clip itself would save: logit_scale a scalar."""
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in student.model.state_dict().items()}
    state["logit_scale"] = state["logit_scale"].reshape(())
    return {name: tensor.to(torch.float32) if tensor.is_floating_point() else tensor for name, tensor in state.items()}
