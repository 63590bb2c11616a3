"""Build or load a two-tower student by configuration name, folder or run."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import open_clip

from student.models.two_tower.model import TwoTower
from teachercache.core.errors import UserError, closest
from teachercache.core.progress import say
from teachercache.teachers.clip.folders import build_module, folder_parts, open_folder, tokenizer_of


def build_two_tower(name: str, init: str = "") -> TwoTower:
    """Build a two-tower student.

    Args:
        name: A key of TINY or an open_clip configuration, built with random weights.
        init: A run or exported folder; its configuration and weights replace `name`.

    Raises:
        UserError: The name or the folder does not exist.
    """
    if init:
        if not Path(init).is_dir():
            raise UserError(
                f"--set init={init}: no such folder; it takes a run, or what `student export` wrote"
            )
        say(f"starting from {init}: its configuration replaces model={name}")
        model, preprocess = open_folder(init)
        model_cfg = folder_parts(init)[0]
        return TwoTower(model, model_cfg, preprocess, tokenizer_of(model_cfg, init))
    model_cfg = TINY.get(name) or open_clip.get_model_config(name)
    if model_cfg is None:
        names = [*TINY, *open_clip.list_models()]
        raise UserError(
            f"--set model={name}: {closest(name, names)}choose {', '.join(TINY)} or an open_clip model"
        )
    model, preprocess = build_module(model_cfg, WHITE_64 if name in TINY else {})
    return TwoTower(model, model_cfg, preprocess, tokenizer_of(model_cfg))


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
    # Half of the cost of vit-tiny, for scripts/demo
    "vit-demo": {
        "embed_dim": 512,
        "vision_cfg": {"image_size": 64, "layers": 4, "width": 192, "head_width": 64, "patch_size": 16},
        "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 128, "heads": 4, "layers": 2},
    },
    # Long enough for a question and its answer
    "vit-tiny-long": {
        "embed_dim": 512,
        "vision_cfg": {"image_size": 64, "layers": 4, "width": 256, "head_width": 64, "patch_size": 16},
        "text_cfg": {"context_length": 48, "vocab_size": 49408, "width": 192, "heads": 4, "layers": 2},
    },
    "vit-micro": {
        "embed_dim": 64,
        "vision_cfg": {"image_size": 32, "layers": 1, "width": 64, "head_width": 32, "patch_size": 8},
        "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 64, "heads": 2, "layers": 1},
    },
}


def rebuild(config: Mapping[str, Any]) -> TwoTower:
    """Return a student of a recorded configuration, with random weights."""
    model, preprocess = build_module(config["model_cfg"], config["preprocess"])
    return TwoTower(model, config["model_cfg"], preprocess, tokenizer_of(config["model_cfg"]))
