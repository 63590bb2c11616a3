"""Allow-lists for configurations that others wrote: what a folder, a run or a cache may pass to a loader.

open_clip, transformers and diffusers pass keys of a configuration on as arguments, and some of these run Python files
that lie beside the configuration. So a configuration is checked before a library reads it. A key that is not known
stops the command; nothing of the folder is imported.
"""

import dataclasses
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from teachercache.core.errors import UserError
from teachercache.data.foreign import Foreign, parse_json

# Keys by which transformers, diffusers and Hydra load code, or kernels and quantizers of other packages
CODE_KEYS = frozenset(
    {
        "auto_map",
        "trust_remote_code",
        "code_revision",
        "custom_generate",
        "custom_pipeline",
        "custom_pipelines",
        "quantization_config",
        "use_kernels",
        "kernel_config",
        "_target_",
    }
)
ATTENTION_KEYS = frozenset({"attn_implementation", "_attn_implementation", "experts_implementation"})
MODEL_KEYS = frozenset(
    {
        "embed_dim",
        "vision_cfg",
        "text_cfg",
        "multimodal_cfg",
        "quick_gelu",
        "custom_text",
        "init_logit_scale",
        "init_logit_bias",
        "nonscalar_logit_scale",
        "output_dict",
    }
)
OPTION_KEYS = {  # of the dictionaries inside a tower's configuration
    "tokenizer_kwargs": frozenset({"clean", "strip_sep_token", "language", "reduction_mask"}),
    "act_kwargs": frozenset({"approximate", "negative_slope", "inplace"}),
    "norm_kwargs": frozenset({"eps", "elementwise_affine", "bias"}),
}
TOKENIZERS = (
    frozenset(  # names of transformers without the ending `Fast`; they read vocabularies and no pickles
        [
            "Albert",
            "Bart",
            "Bert",
            "Camembert",
            "CLIP",
            "Deberta",
            "DebertaV2",
            "DistilBert",
            "Electra",
            "Gemma",
            "GPT2",
            "Llama",
            "M2M100",
            "MBart",
            "MBart50",
            "MPNet",
            "MT5",
            "Nllb",
            "PreTrained",
            "Qwen2",
            "Roberta",
            "Siglip",
            "T5",
            "XLMRoberta",
            "XLNet",
        ]
    )
)
TEXT_MODELS = frozenset({"bert", "m2m_100", "mt5", "roberta", "xlm-roberta"})  # open_clip knows their sizes
CONFIG_FILES = (  # those that transformers and diffusers read
    "config.json",
    "generation_config.json",
    "image_processor_config.json",
    "model_index.json",
    "preprocessor_config.json",
    "processor_config.json",
    "scheduler_config.json",
    "tokenizer_config.json",
)
PLAIN_NAME = re.compile(r"[A-Za-z0-9_.\-]+")  # timm also reads `hf-hub:ORG/NAME` and `local-dir:PATH`
HUB_NAME = re.compile(r"[A-Za-z0-9_.\-]+(/[A-Za-z0-9_.\-]+)?")
LARGEST = 10**7  # a size in a configuration, such as that of a vocabulary


def read_config(path: Path) -> dict[str, Any]:
    """Read a JSON file of a folder that somebody else wrote.

    Raises:
        UserError: It is missing, no JSON object, or nested too deep.
    """
    try:
        value = parse_json(path.read_bytes(), what=str(path))
    except FileNotFoundError as error:
        raise UserError(f"{path} is missing: pass a folder that has it") from error
    except Foreign as error:
        raise UserError(f"{error}: get the file again") from error
    if not isinstance(value, dict):
        raise UserError(f"{path} is no JSON object: get the file again")
    return value


def check_code_keys(config: Any, where: str | Path) -> None:
    """Check that no key, at any depth, makes a library load code.

    Raises:
        UserError: There is one; the message names the file and the key.
    """
    for key, value in _items(config):
        if (key in CODE_KEYS and value not in (None, False, {}, [])) or (
            key in ATTENTION_KEYS and not _is_plain(value)
        ):
            raise UserError(
                f"{where} has the key '{key}', which loads code; code of a folder never runs: remove the key, or pass "
                "a model that needs no code of its own"
            )


def _items(value: Any) -> Iterator[tuple[str, Any]]:
    """Yield the keys and values of all dictionaries in a value."""
    pending = [value]
    while pending:
        value = pending.pop()
        if isinstance(value, Mapping):
            yield from value.items()
            pending.extend(value.values())
        elif isinstance(value, list | tuple):
            pending.extend(value)


def _is_plain(value: Any) -> bool:
    """Return whether an attention implementation is a word of transformers, not a kernel on the hub."""
    words = value.values() if isinstance(value, Mapping) else [value]
    return all(word is None or (isinstance(word, str) and word.isidentifier()) for word in words)


def check_folder(folder: str | Path) -> None:
    """Check the configuration files of a folder that transformers or diffusers will read.

    Raises:
        UserError: One has a key that loads code, or names a tokenizer that is not known here.
    """
    folder = Path(folder)
    if (folder / "adapter_config.json").exists():
        raise UserError(
            f"{folder}/adapter_config.json loads another model: merge the adapter into the weights"
        )
    for path in (folder / name for name in CONFIG_FILES):
        if not path.exists():
            continue
        config = read_config(path)
        check_code_keys(config, path)
        check_tokenizer_class(config.get("tokenizer_class"), f"{path}, key 'tokenizer_class'")


def check_tokenizer_class(name: Any, where: str) -> None:
    """Check the name of a tokenizer's class.

    Raises:
        UserError: It is not one of TOKENIZERS.
    """
    if name in (None, "", "TokenizersBackend"):
        return
    if not isinstance(name, str) or name.removesuffix("Fast").removesuffix("Tokenizer") not in TOKENIZERS:
        raise UserError(
            f"{where}: the tokenizer {name!r} is not known here; pass one that has a tokenizer.json"
        )


def check_source(name: Any, where: str | Path) -> None:
    """Check the name of a model or tokenizer of transformers: a folder without code, or a name on the hub.

    A name on the hub is loaded with `trust_remote_code=False`.
    """
    if isinstance(name, str) and Path(name).is_dir():
        check_folder(name)
    elif not isinstance(name, str) or not HUB_NAME.fullmatch(name):
        raise UserError(f"{where} names {name!r}, which is neither a folder nor a name on the hub")


# ----------------------------------------------------------------------------------------------------
# open_clip


def check_open_clip(model_cfg: Any, preprocess_cfg: Any, where: str | Path) -> None:
    """Check an open_clip configuration: every key is one of open_clip's own, every value is plain.

    Args:
        model_cfg: The architecture.
        preprocess_cfg: The preprocessing.
        where: The file, for the message.

    Raises:
        UserError: A key or value is not allowed; the message names file and key.
    """
    from open_clip.coca_model import MultimodalCfg
    from open_clip.model import CLIPTextCfg, CLIPVisionCfg

    _check_keys(model_cfg, MODEL_KEYS, where, "model_cfg")
    for name in ("vision_cfg", "text_cfg"):
        if not isinstance(model_cfg.get(name), Mapping):
            raise UserError(f"{where} has no '{name}' in its model_cfg: pass an open_clip configuration")
    if type(model_cfg.get("embed_dim")) is not int:
        raise UserError(f"{where} has no whole number 'embed_dim' in its model_cfg")
    parts = {
        "vision_cfg": (model_cfg["vision_cfg"], CLIPVisionCfg),
        "text_cfg": (model_cfg["text_cfg"], CLIPTextCfg),
        "multimodal_cfg": (model_cfg.get("multimodal_cfg") or {}, MultimodalCfg),
    }
    for name, (part, kind) in parts.items():
        _check_keys(part, {field.name for field in dataclasses.fields(kind)}, where, name)
        for key, value in part.items():
            if key in OPTION_KEYS and value is not None:
                _check_keys(value, OPTION_KEYS[key], where, f"{name}.{key}")
                _check_values(value, where, f"{name}.{key}")
        _check_values({key: value for key, value in part.items() if key not in OPTION_KEYS}, where, name)
    rest = {key: value for key, value in model_cfg.items() if key not in parts}
    _check_values(rest, where, "model_cfg")
    timm = model_cfg["vision_cfg"].get("timm_model_name")
    if timm is not None and not PLAIN_NAME.fullmatch(str(timm)):
        raise UserError(f"{where}: vision_cfg.timm_model_name is {timm!r}; only timm's own names are allowed")
    _check_preprocess(preprocess_cfg, where)


def _check_preprocess(config: Any, where: str | Path) -> None:
    """Check the keys and values of a preprocess_cfg."""
    _check_keys(config, PREPROCESS_VALUES.keys(), where, "preprocess_cfg")
    for key, value in config.items():
        if value is not None and not PREPROCESS_VALUES[key](value):
            raise UserError(
                f"{where}: the value of '{key}' in preprocess_cfg is not one that open_clip reads"
            )


def _are_numbers(value: Any, count: int) -> bool:
    """Return whether a value is a list of numbers that are no larger than LARGEST."""
    return (
        isinstance(value, list | tuple)
        and len(value) == count
        and all(isinstance(one, int | float) and abs(one) <= LARGEST for one in value)
    )


PREPROCESS_VALUES: dict[str, Callable[[Any], bool]] = {
    "size": lambda value: _are_numbers(value, 2) or _are_numbers([value], 1),
    "mode": lambda value: value == "RGB",
    "mean": lambda value: _are_numbers(value, 3),
    "std": lambda value: _are_numbers(value, 3),
    "interpolation": lambda value: value in ("bicubic", "bilinear", "random"),
    "resize_mode": lambda value: value in ("shortest", "longest", "squash"),
    "fill_color": lambda value: _are_numbers([value], 1),
    "at_least": lambda value: _are_numbers([value], 1),  # ours, of exports; computed again when they are read
}


def tokenizer_options(text_cfg: Mapping[str, Any], where: str | Path) -> dict[str, Any]:
    """Return the options of a tokenizer that a configuration may set; UserError for any other."""
    options = text_cfg.get("tokenizer_kwargs") or {}
    _check_keys(options, OPTION_KEYS["tokenizer_kwargs"], where, "text_cfg.tokenizer_kwargs")
    return dict(options)


def _check_keys(config: Any, allowed: Any, where: str | Path, name: str) -> None:
    if not isinstance(config, Mapping):
        raise UserError(f"{where}: {name} is a {type(config).__name__}, not an object")
    for key in config:
        if key not in allowed:
            raise UserError(
                f"{where} has the key '{key}' in {name}, which is not allowed: a configuration may set "
                f"{', '.join(sorted(allowed))}"
            )


def _check_values(config: Mapping[str, Any], where: str | Path, name: str) -> None:
    """Check that values are numbers up to LARGEST, short words, or short lists of them."""
    for key, value in config.items():
        values = value if isinstance(value, list | tuple) else [value]
        for one in values:
            plain = (
                one is None
                or isinstance(one, bool | int | float)
                or (isinstance(one, str) and len(one) < 4096)
            )
            large = isinstance(one, int | float) and abs(one) > LARGEST
            if not plain or large or len(values) > 16:
                raise UserError(f"{where}: the value of '{key}' in {name} is not one that open_clip reads")
