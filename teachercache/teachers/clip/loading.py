"""Load CLIP teachers through open_clip: by name and tag, from the hub, from a folder or a file, or with
random weights.

Only safetensors files and weights_only loading are used. Preprocessing is that of the checkpoint.
"""

import contextlib
import logging
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import huggingface_hub
import open_clip
import torch
from jaxtyping import Float
from torch import Tensor

from teachercache.cache.spec import Field, TeacherSpec
from teachercache.core.errors import UserError, closest, is_machine
from teachercache.core.paths import closest_path
from teachercache.core.progress import say
from teachercache.data.views import describe_view, image_view
from teachercache.teachers.allowed import check_open_clip, read_config
from teachercache.teachers.clip.folders import (
    build_module,
    folder_parts,
    load_weights,
    open_folder,
    tokenizer_of,
)
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

HUB = "hf-hub:"


def load_clip(name: str, *, architecture: str, tag: str, weights: str, outputs: tuple[str, ...]) -> Teacher:
    """Load a CLIP teacher: pretrained (by tag), `random:SEED`, or with weights from a file or folder."""
    source = f"local-dir:{weights}" if Path(weights).is_dir() else architecture
    if architecture.startswith("local-dir:") and weights != "pretrained":
        raise UserError(f"--weights {weights}: the folder {name} has its own weights; leave --weights away")
    if source.startswith("local-dir:"):
        folder = source.removeprefix("local-dir:")
        module, preprocess = open_folder(folder)
        tokenizer = tokenizer_of(folder_parts(folder)[0], folder)
    elif source.startswith(HUB):
        module, preprocess, tokenizer = _from_hub(name, source.removeprefix(HUB), weights)
    else:
        seed = random_seed(weights)
        cfg = open_clip.get_pretrained_cfg(architecture, tag) if tag else {}
        if seed is not None:
            module, preprocess = _random(architecture, cfg, seed)
        else:
            module, preprocess = _pretrained(name, architecture, tag, weights)
        tokenizer = open_clip.get_tokenizer(architecture)  # of a configuration inside open_clip
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


def _random(architecture: str, tag_cfg: Mapping[str, Any], seed: int) -> tuple[Any, dict[str, Any]]:
    """Build an architecture with random weights, with the view and activation of a tag."""
    model_cfg = open_clip.get_model_config(architecture)
    if model_cfg is None:
        raise UserError(
            f"open_clip has no model '{architecture}': {closest(architecture, open_clip.list_models())}"
        )
    if tag_cfg.get("quick_gelu"):
        model_cfg["quick_gelu"] = True
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build_module(model_cfg, tag_view(tag_cfg))


def tag_view(tag_cfg: Mapping[str, Any]) -> dict[str, Any]:
    """Return the preprocessing of a tag's entry in open_clip's table, without the size, which the model decides."""
    keys = ("mean", "std", "interpolation", "resize_mode", "fill_color")
    return {key: tag_cfg[key] for key in keys if tag_cfg.get(key) is not None}


def _pretrained(name: str, architecture: str, tag: str, weights: str) -> tuple[Any, dict[str, Any]]:
    """Load weights by tag through open_clip (downloaded the first time), or from a checkpoint file.

    A file has neither view nor activation: both are those of the tag.
    """
    if weights != "pretrained" and not Path(weights).is_file():
        raise UserError(
            f"--weights {weights}: no such file or folder: {closest_path(weights)}pass a checkpoint, pretrained or random:SEED"
        )
    tag_cfg = open_clip.get_pretrained_cfg(architecture, tag)
    if not tag_cfg and weights != "pretrained":
        tags = open_clip.list_pretrained_tags_by_model(architecture)
        say(
            f"{name}: open_clip has no weights '{tag}' of {architecture}, so the view and the activation of {weights} "
            f"are guessed: OpenAI's mean and std, {'QuickGELU' if 'quickgelu' in architecture else 'GELU'}. Name a tag "
            f"that has its own: {', '.join(tags) or 'none'}; or pass a folder with open_clip_config.json"
        )
    with _hub(name):
        module = open_clip.create_model(
            architecture,
            pretrained=tag if weights == "pretrained" else weights,
            force_quick_gelu=bool(tag_cfg.get("quick_gelu")),
            force_preprocess_cfg=tag_view(tag_cfg),
            require_pretrained=True,
        )
    return module, module.visual.preprocess_cfg


def _from_hub(name: str, repository: str, weights: str) -> tuple[Any, dict[str, Any], Any]:
    """Load an open_clip repository of the hub: module, preprocess_cfg and tokenizer.

    Its configuration is checked before open_clip or transformers read it. With a file of weights, the repository has
    only the configuration.
    """
    if (seed := random_seed(weights)) is not None:
        raise UserError(
            f"--weights random:{seed} needs an architecture without download: try --teacher clip-vit-b16"
        )
    if weights != "pretrained" and not Path(weights).is_file():
        raise UserError(
            f"--weights {weights}: no such file or folder: {closest_path(weights)}pass a checkpoint or pretrained"
        )
    download = open_clip.factory.download_pretrained_from_hf
    with _hub(name):
        config_path = Path(download(repository, filename="open_clip_config.json"))
        config = read_config(config_path)
        preprocess_cfg = config.get("preprocess_cfg", {})
        check_open_clip(config.get("model_cfg"), preprocess_cfg, config_path)
        module, preprocess = build_module(config["model_cfg"], preprocess_cfg)
        load_weights(module, Path(download(repository)) if weights == "pretrained" else Path(weights))
        return module, preprocess, tokenizer_of(config["model_cfg"])


@contextlib.contextmanager
def _hub(name: str) -> Iterator[None]:
    """Keep open_clip from logging, do without the hub where it cannot be reached, and explain its errors."""
    level = logging.getLogger().level
    logging.getLogger().setLevel(logging.CRITICAL)  # open_clip logs failures to the root logger
    offline = huggingface_hub.constants.HF_HUB_OFFLINE
    huggingface_hub.constants.HF_HUB_OFFLINE = offline or not hub_answers()
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        if is_machine(error):
            raise
        if "TorchScript" in str(error):
            raise UserError(
                f"the weights of {name} are a TorchScript archive, which is a program and is not run: save its tensors as "
                "safetensors with a program that you trust (`torch.jit.load(FILE).state_dict()`), and pass that file"
            ) from error
        reason = (str(error).splitlines() or ["?"])[0][:120]
        raise UserError(
            f"cannot get the weights of {name} ({type(error).__name__}: {reason}). Pass --weights PATH (a checkpoint "
            "you have), --weights random:0 (the same architecture, untrained), or --teacher clip-lite"
        ) from error
    finally:
        logging.getLogger().setLevel(level)
        huggingface_hub.constants.HF_HUB_OFFLINE = offline


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
