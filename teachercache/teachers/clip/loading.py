"""Load CLIP teachers through open_clip: by name and tag, from the hub, from a folder or a file, or with
random weights.

Only safetensors files and weights_only loading are used. Preprocessing is that of the checkpoint.
"""

import json
import logging
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import huggingface_hub
import open_clip
import torch
from jaxtyping import Float
from open_clip.tokenizer import HFTokenizer
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from teachercache.cache.spec import Field, TeacherSpec
from teachercache.core.digests import names_to_load, refuse_damage
from teachercache.core.errors import UserError, closest
from teachercache.data.views import describe_view, image_view
from teachercache.teachers.clip.layers import (
    EMBEDDINGS,
    Taps,
    join_outputs,
    parse_outputs,
    picture_fields,
    plan_taps,
    plan_words,
    text_fields,
)
from teachercache.teachers.clip.towers import describe
from teachercache.teachers.clip.word_selection import Words, WordSelection
from teachercache.teachers.teacher import Inputs, Teacher
from teachercache.teachers.weights import digest_weights, hub_answers, random_seed


def load_clip(name: str, *, architecture: str, tag: str, weights: str, outputs: tuple[str, ...]) -> Teacher:
    """Load a CLIP teacher: pretrained (by tag), `random:SEED`, or with weights from a file or folder."""
    source = f"local-dir:{weights}" if Path(weights).is_dir() else architecture
    if architecture.startswith("local-dir:") and weights != "pretrained":
        raise UserError(f"--weights {weights}: the folder {name} has its own weights; leave --weights away")
    if source.startswith("local-dir:"):
        module, preprocess = open_folder(source.removeprefix("local-dir:"))
    elif (seed := random_seed(weights)) is not None:
        module, preprocess = _random(architecture, seed)
    else:
        module, preprocess = _pretrained(name, architecture, tag, weights)
    tokenizer = _tokenizer(source)
    return make_teacher(name, module, preprocess, tokenizer, weights=weights, outputs=outputs)


def make_teacher(
    name: str,
    module: Any,
    preprocess: Mapping[str, Any],
    tokenizer: Any,
    *,
    weights: str,
    outputs: tuple[str, ...],
) -> Teacher:
    """Make a Teacher from any module with `encode_image`, `encode_text` and perhaps `logit_scale`."""
    module = module.eval().requires_grad_(False)
    view = describe_view(preprocess)
    constants = {
        key: float(getattr(module, key))
        for key in ("logit_scale", "logit_bias")
        if getattr(module, key, None) is not None
    }
    requested = parse_outputs(outputs)
    taps = plan_taps(name, module, requested)
    fields, selection = _fields(module, image_view(view), tokenizer, taps), plan_words(requested, tokenizer)
    if selection is not None:
        widths = {field.name: field.shape[0] for field in fields if field.name in ("image_emb", "text_emb")}
        if len({*widths.values()}) > 1:
            raise UserError(
                f"{name}'s pictures are {widths['image_emb']} wide and its texts {widths['text_emb']}: tokens "
                "need one space, take a CLIP teacher whose towers share it"
            )
        fields += selection.fields(widths["text_emb"])
    spec = TeacherSpec(
        name=name,
        weights=weights,
        digest=digest_weights(module),
        outputs=join_outputs(requested),
        fields=fields,
        view=view,
        tokenizer={
            "kind": type(tokenizer).__name__,
            "context_length": tokenizer.context_length,
            "vocab_size": len(getattr(tokenizer, "tokenizer", None) or tokenizer.encoder),
        },
        constants=constants,
        inputs=("image", "text", "words") if selection else ("image", "text"),
    )
    return Teacher(
        spec=spec,
        module=module,
        encode=partial(encode, taps=taps, selection=selection),
        view=image_view(view),
        tokenize=tokenizer,
        find_words=selection.find if selection else None,
    )


def encode(
    module: Any, inputs: Inputs, *, taps: Taps = EMBEDDINGS, selection: WordSelection | None = None
) -> dict[str, Float[Tensor, "rows ..."]]:
    """Compute the fields that `taps` and `selection` name, of the images and texts in `inputs`."""
    fields: dict[str, Tensor] = {}
    if "image" in inputs:
        fields |= picture_fields(module, inputs["image"], taps)
    if "text" in inputs:
        fields |= text_fields(module, inputs["text"], taps)
    words = inputs.get("words")
    if selection is not None and isinstance(words, Words):
        images = None
        if "pair_image" in inputs:
            index, valid = inputs["pair_image"].flatten(), inputs["pair_valid"].flatten()
            images = torch.where(valid[:, None], fields["image_emb"][index], 0)
        fields |= selection.weigh(module, words, images)
    return fields


def open_folder(folder: str) -> tuple[Any, dict[str, Any]]:
    """Return module and preprocess_cfg of an open_clip folder, or of a run of `student train`.

    A text tower from transformers reads its config.json from the same folder, so that the folder can be
    moved.
    """
    remedy = "copy the folder again from where it is whole, or train or export it again"
    refuse_damage(Path(folder), names_to_load(Path(folder)), remedy)
    model_cfg, preprocess_cfg, weights_path = folder_parts(folder)
    try:
        state = load_file(weights_path)
    except (OSError, ValueError, SafetensorError) as error:
        raise UserError(f"{folder} has no readable {weights_path.name}: {error}") from error
    module, preprocess = build_module(model_cfg, preprocess_cfg, folder=folder)
    if state["logit_scale"].ndim:  # trained as a vector of one
        state["logit_scale"] = state["logit_scale"].reshape(module.logit_scale.shape)
    module.load_state_dict(state)
    return module, preprocess


def folder_parts(folder: str) -> tuple[dict[str, Any], dict[str, Any], Path]:
    """Return model_cfg, preprocess_cfg and the weights file of a folder.

    An open_clip folder has open_clip_config.json and open_clip_model.safetensors; a run describes its student
    in run.json, beside model.safetensors.
    """
    config_path, run_path = Path(folder, "open_clip_config.json"), Path(folder, "run.json")
    try:
        if run_path.exists() and not config_path.exists():
            student, weights_path = (
                json.loads(run_path.read_text())["student"] or {},
                Path(folder, "model.safetensors"),
            )
            if "model_cfg" in student:
                raise UserError(f"{folder} is a run of an older format: train it again")
            config = student.get("config", {})
            if "model_cfg" not in config:
                raise UserError(f"{folder} trained no model of two towers: pass another --teacher")
            if not weights_path.exists():
                raise UserError(
                    f"{folder} is not a finished run: go on with `student train --resume --out {folder}`"
                )
            return config["model_cfg"], config["preprocess"], weights_path
        config = json.loads(config_path.read_text())
        return (
            config["model_cfg"],
            config.get("preprocess_cfg", {}),
            Path(folder, "open_clip_model.safetensors"),
        )
    except (OSError, KeyError, TypeError, json.JSONDecodeError) as error:
        raise UserError(
            f"{folder} is neither an open_clip folder with open_clip_config.json and open_clip_model.safetensors, "
            f"nor a run of `student train`: {error}"
        ) from error


def tokenizer_of(model_cfg: Mapping[str, Any], folder: str = "") -> Any:
    """Return the tokenizer of a configuration: CLIP's, or one of Hugging Face (with files in `folder`)."""
    text_cfg = model_cfg["text_cfg"]
    length, options = text_cfg.get("context_length", 77), text_cfg.get("tokenizer_kwargs", {})
    if "hf_tokenizer_name" not in text_cfg:
        return open_clip.SimpleTokenizer(context_length=length, **options)
    source = (
        folder if folder and Path(folder, "tokenizer_config.json").exists() else text_cfg["hf_tokenizer_name"]
    )
    return HFTokenizer(
        source, context_length=length, tokenizer_mode=text_cfg.get("tokenizer_mode"), **options
    )


def build_module(
    model_cfg: Mapping[str, Any], preprocess_cfg: Mapping[str, Any], *, folder: str = ""
) -> tuple[Any, dict[str, Any]]:
    """Build an open_clip model with random weights from its configuration; also return its complete
    preprocess_cfg.
    """
    from open_clip.transform import PreprocessCfg, merge_preprocess_dict

    cfg = json.loads(json.dumps(model_cfg))  # a deep copy: open_clip modifies it
    custom = cfg.pop("custom_text", False)
    if "hf_model_name" in cfg["text_cfg"]:
        custom = True
        cfg["text_cfg"]["hf_model_pretrained"] = False
        if folder and Path(folder, "config.json").exists():
            cfg["text_cfg"]["hf_model_name"] = folder
    if "timm_model_name" in cfg["vision_cfg"]:
        cfg["vision_cfg"]["timm_model_pretrained"] = False
    module = (open_clip.CustomTextCLIP if custom else open_clip.CLIP)(**cfg)
    preprocess = merge_preprocess_dict(PreprocessCfg(), dict(preprocess_cfg))
    return module, {**preprocess, "size": module.visual.image_size}


def _random(architecture: str, seed: int) -> tuple[Any, dict[str, Any]]:
    if architecture.startswith("hf-hub:"):
        raise UserError(
            f"--weights random:{seed} needs an architecture without download: try --teacher clip-vit-b16"
        )
    model_cfg = open_clip.get_model_config(architecture)
    if model_cfg is None:
        raise UserError(
            f"open_clip has no model '{architecture}': {closest(architecture, open_clip.list_models())}"
        )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build_module(model_cfg, {})


def _pretrained(name: str, architecture: str, tag: str, weights: str) -> tuple[Any, dict[str, Any]]:
    """Load weights by tag through open_clip (downloaded the first time), or from a checkpoint file."""
    if weights != "pretrained" and not Path(weights).is_file():
        raise UserError(f"--weights {weights}: no such file or folder (or write pretrained, or random:SEED)")
    logging.getLogger().setLevel(logging.CRITICAL)  # open_clip logs failures to the root logger
    offline = huggingface_hub.constants.HF_HUB_OFFLINE
    huggingface_hub.constants.HF_HUB_OFFLINE = offline or not hub_answers()
    try:
        module = open_clip.create_model(
            architecture,
            pretrained=tag if weights == "pretrained" else weights,
            require_pretrained=True,
        )
    except Exception as error:
        reason = str(error).splitlines()[0][:120]
        raise UserError(
            f"cannot get the weights of {name} ({type(error).__name__}: {reason}). Pass --weights PATH (a checkpoint "
            "you have), --weights random:0 (the same architecture, untrained), or --teacher clip-lite"
        ) from error
    finally:
        logging.getLogger().setLevel(logging.WARNING)
        huggingface_hub.constants.HF_HUB_OFFLINE = offline
    return module, module.visual.preprocess_cfg


def _tokenizer(source: str) -> Any:
    folder = source.removeprefix("local-dir:")
    if (
        folder != source and not Path(folder, "open_clip_config.json").exists()
    ):  # a run, which open_clip does not support
        return tokenizer_of(folder_parts(folder)[0], folder)
    return open_clip.get_tokenizer(source)


def _fields(module: Any, view: Any, tokenizer: Any, taps: Taps) -> tuple[Field, ...]:
    """Return the fields of the taps, from one forward pass."""
    from PIL import Image

    inputs: Inputs = {"image": view(Image.new("RGB", (32, 32)))[None], "text": tokenizer(["a"])}
    with torch.inference_mode():
        fields = encode(module, inputs, taps=taps)
    return tuple(
        Field(
            name,
            tuple(tensor.shape[1:]),
            "text" if name.startswith("text") else "image",
            "float16",
            describe(module, name),
        )
        for name, tensor in fields.items()
    )
