"""Open folders that others wrote: open_clip's, and runs of `student train`. Nothing in a folder runs.

A configuration is checked by `teachercache.teachers.allowed` before open_clip or transformers read it. Weights are
safetensors, or loaded with `weights_only`.
"""

import functools
import json
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import open_clip
from open_clip.tokenizer import HFTokenizer
from safetensors import SafetensorError

from teachercache.core.digests import names_to_load, refuse_damage
from teachercache.core.errors import UserError, is_machine
from teachercache.teachers.allowed import (
    TEXT_MODELS,
    check_folder,
    check_open_clip,
    check_source,
    read_config,
    tokenizer_options,
)


def open_folder(folder: str) -> tuple[Any, dict[str, Any]]:
    """Return module and preprocess_cfg of an open_clip folder, or of a run of `student train`.

    A text tower from transformers reads its config.json from the same folder, so that the folder can be
    moved.

    Raises:
        UserError: A configuration has a key that is not allowed, or the weights do not fit.
    """
    remedy = "copy the folder again from where it is whole, or train or export it again"
    refuse_damage(Path(folder), names_to_load(Path(folder)), remedy)
    model_cfg, preprocess_cfg, weights_path = folder_parts(folder)
    module, preprocess = build_module(model_cfg, preprocess_cfg, folder=folder)
    load_weights(module, weights_path)
    return module, preprocess


def load_weights(module: Any, path: Path) -> None:
    """Load a file of weights into a module as open_clip does, from safetensors or with `weights_only`.

    open_clip removes the prefix `module.`, resizes positional embeddings, converts the names of other projects and
    leaves out position ids.

    Raises:
        UserError: The file is not readable, or its tensors do not fit.
    """
    try:
        open_clip.factory.load_checkpoint(module, str(path))
    except Exception as error:  # the libraries have no common error for files that are damaged or do not fit
        if is_machine(error):
            raise
        folder = path.parent
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        if isinstance(error, OSError | SafetensorError):
            raise UserError(f"{folder} has no readable {path.name}: {reason}") from error
        raise UserError(f"{folder}: {path.name} does not fit its configuration: {reason}") from error


def folder_parts(folder: str) -> tuple[dict[str, Any], dict[str, Any], Path]:
    """Return model_cfg, preprocess_cfg and the weights file of a folder.

    An open_clip folder has open_clip_config.json and open_clip_model.safetensors; a run describes its student
    in run.json, beside model.safetensors.
    """
    config_path, run_path = Path(folder, "open_clip_config.json"), Path(folder, "run.json")
    if run_path.exists() and not config_path.exists():
        student = read_config(run_path).get("student") or {}
        if "model_cfg" in student:
            raise UserError(f"{folder} is a run of an older format: train it again")
        config = student.get("config", {})
        if "model_cfg" not in config:
            raise UserError(f"{folder} trained no model of two towers: pass another --teacher")
        weights_path, source = Path(folder, "model.safetensors"), run_path
        if not weights_path.exists():
            raise UserError(
                f"{folder} is not a finished run: go on with `student train --resume --out {shlex.quote(folder)}`"
            )
        preprocess_cfg = config.get("preprocess", {})
    else:
        if not config_path.exists():
            raise UserError(
                f"{folder} is neither an open_clip folder with open_clip_config.json and "
                f"open_clip_model.safetensors, nor a run of `student train`: {config_path} is missing"
            )
        config, source = read_config(config_path), config_path
        preprocess_cfg = config.get("preprocess_cfg", {})
        weights_path = Path(folder, "open_clip_model.safetensors")
    check_folder(folder)
    check_open_clip(config.get("model_cfg"), preprocess_cfg, source)
    return config["model_cfg"], preprocess_cfg, weights_path


def tokenizer_of(model_cfg: Mapping[str, Any], folder: str = "") -> Any:
    """Return the tokenizer of a configuration: CLIP's, or one of Hugging Face (with files in `folder`).

    Raises:
        UserError: The configuration passes an option that is not allowed, or the tokenizer cannot be loaded.
    """
    text_cfg, where = model_cfg["text_cfg"], folder or "the configuration"
    options = {"context_length": text_cfg.get("context_length", 77), **tokenizer_options(text_cfg, where)}
    name = text_cfg.get("hf_tokenizer_name")
    try:
        if not name:
            return _clip_tokenizer(**options)
        files = [Path(folder, file) for file in ("tokenizer_config.json", "tokenizer.json")]
        source = folder if folder and any(file.exists() for file in files) else name
        check_source(source, f"{where}, text_cfg.hf_tokenizer_name")
        mode = text_cfg.get("tokenizer_mode")
        return HFTokenizer(source, tokenizer_mode=mode, trust_remote_code=False, **options)
    except (OSError, ValueError, TypeError, KeyError, ImportError) as error:
        if isinstance(error, UserError) or is_machine(error):
            raise
        raise UserError(f"{where}: cannot load the tokenizer {name}: {_first_line(error)}") from error


@functools.lru_cache
def _clip_tokenizer(**options: Any) -> Any:
    """CLIP's tokenizer, read once per process: its merges take a quarter of a second."""
    return open_clip.SimpleTokenizer(**options)


def build_module(
    model_cfg: Mapping[str, Any], preprocess_cfg: Mapping[str, Any], *, folder: str = ""
) -> tuple[Any, dict[str, Any]]:
    """Build an open_clip model with random weights from its configuration; also return its complete
    preprocess_cfg.

    Raises:
        UserError: The configuration has a key that is not allowed, or open_clip cannot build it.
    """
    from open_clip.transform import PreprocessCfg, merge_preprocess_dict

    where = folder or "the configuration"
    check_open_clip(model_cfg, preprocess_cfg, where)
    cfg = json.loads(json.dumps(model_cfg))  # a deep copy: open_clip modifies it
    custom = cfg.pop("custom_text", False)
    if cfg["text_cfg"].get("hf_model_name"):
        custom = True
        cfg["text_cfg"]["hf_model_pretrained"] = False
        if folder and Path(folder, "config.json").exists():
            cfg["text_cfg"]["hf_model_name"] = folder
        _check_text_model(cfg["text_cfg"]["hf_model_name"], where)
    if "timm_model_name" in cfg["vision_cfg"]:
        cfg["vision_cfg"]["timm_model_pretrained"] = False
    kind = open_clip.CLIP
    if custom:
        kind = open_clip.CoCa if "multimodal_cfg" in cfg else open_clip.CustomTextCLIP
    try:
        module = kind(**cfg)
    except Exception as error:  # any value that does not fit another one
        if is_machine(error):
            raise
        raise UserError(f"{where}: open_clip cannot build its model: {_first_line(error)}") from error
    preprocess = merge_preprocess_dict(PreprocessCfg(), dict(preprocess_cfg))
    return module, {**preprocess, "size": module.visual.image_size}


def _check_text_model(name: Any, where: str) -> None:
    """Check the configuration of a text tower from transformers: it needs no code, and open_clip knows its kind."""
    from transformers import AutoConfig

    check_source(name, f"{where}, text_cfg.hf_model_name")
    try:
        kind = AutoConfig.from_pretrained(name, trust_remote_code=False).model_type
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{where}: cannot read the text tower {name}: {_first_line(error)}") from error
    if kind not in TEXT_MODELS:
        raise UserError(f"{where}: its text tower is a '{kind}', not one of {', '.join(sorted(TEXT_MODELS))}")


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:160]
