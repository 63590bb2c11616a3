"""Build or load a two-tower student by name, folder or run."""

import json
from pathlib import Path
from typing import Any

import open_clip
from safetensors.torch import load_file

from student.models.two_tower.model import TwoTower
from teachercache.core.errors import UserError, closest
from teachercache.core.progress import say
from teachercache.teachers.clip.loading import build_module, folder_parts, open_folder, tokenizer_of


def build_two_tower(name: str, init: str = "") -> TwoTower:
    """A student by configuration name, or from `init`, a run or an exported folder whose configuration then counts."""
    if init:
        if not Path(init).is_dir():
            raise UserError(
                f"--set init={init}: no such folder; it takes a run, or what `student export` wrote"
            )
        say(f"starting from {init}: its configuration counts, not model={name}")
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
    "vit-tiny-long": {  # reads a question and its answer
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


def load_student(run: Path) -> TwoTower:
    """The trained student of a run folder, from that folder alone."""
    if not (run / "run.json").exists():
        raise UserError(f"{run} is not a run: pass a folder that `student train` wrote")
    facts = json.loads((run / "run.json").read_text())
    recipe, made = facts["recipe"], facts["student"]
    if made is None:
        name = recipe["constants"]["model"]
        raise UserError(
            f"{run} trained {name}, which is no model of its own: see scripts/teachers/clip_lite.py"
        )
    if "model_cfg" not in made:
        raise UserError(
            f"{run} is no model of two towers but a run of {recipe['name']}: "
            + OTHERS.get(recipe["name"], "`student eval` takes it with the task that it was trained on")
        )
    if not (run / "model.safetensors").exists():
        raise UserError(
            f"{run} is not a finished run: `student train --recipe {recipe['name']} --resume --out {run}`"
        )
    model, preprocess = build_module(made["model_cfg"], made["preprocess"])
    student = TwoTower(model, made["model_cfg"], preprocess, tokenizer_of(made["model_cfg"]))
    state = load_file(run / "model.safetensors")
    student.model.load_state_dict({**state, "logit_scale": state["logit_scale"].reshape(1)})
    return student.eval()


OTHERS = {"vlkd": "`student generate` takes it, and `student export --format hf`"}  # instead of eval
