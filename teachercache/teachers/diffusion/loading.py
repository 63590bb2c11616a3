"""Load diffusion teachers from folders of diffusers, from the hub, or with random weights; only safetensors.

A folder is written by `StableDiffusionPipeline.save_pretrained`: model_index.json, unet, vae, text_encoder,
tokenizer, scheduler. Without a VAE the UNet works on pixels.
"""

import contextlib
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from teachercache.cache.spec import TeacherSpec
from teachercache.core.errors import UserError
from teachercache.core.progress import quiet_transformers
from teachercache.data.views import describe_view, image_view
from teachercache.teachers.allowed import check_folder, check_tokenizer_class, read_config
from teachercache.teachers.diffusion.model import PREDICTIONS, Diffusion, latent_shape
from teachercache.teachers.diffusion.outputs import (
    check_block,
    constants,
    encode,
    fields_of,
    join_outputs,
    parse_outputs,
)
from teachercache.teachers.teacher import Teacher
from teachercache.teachers.weights import digest_weights, hub_answers, random_seed

HOME = Path(__file__).with_name("sd_tiny")
SD_V1_4 = "CompVis/stable-diffusion-v1-4"
NEEDED = {"unet": "UNet2DConditionModel", "text_encoder": "CLIPTextModel", "vae": "AutoencoderKL"}
LIBRARIES = (None, "diffusers", "transformers")
SD_V1: dict[str, dict[str, Any]] = {  # values that differ from the defaults of the classes
    "unet": {"sample_size": 64, "cross_attention_dim": 768},
    "vae": {
        "sample_size": 512,
        "block_out_channels": [128, 256, 512, 512],
        "down_block_types": ["DownEncoderBlock2D"] * 4,
        "up_block_types": ["UpDecoderBlock2D"] * 4,
        "layers_per_block": 2,
    },
    "text_encoder": {
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "projection_dim": 768,
    },
    "scheduler": {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"},
}
Tokenize = Callable[[list[str]], Int[Tensor, "texts length"]]


def load_diffusion(name: str, *, source: str, weights: str, outputs: tuple[str, ...]) -> Teacher:
    """Load a diffusion teacher from `hub:ORG/NAME` or `folder:PATH`; --weights may be `random:SEED` or
    another folder.
    """
    seed = random_seed(weights)
    if seed is not None and source == f"hub:{SD_V1_4}":
        module, tokenize, tokenizer = random_sd_v1(seed)
    else:
        folder = _folder(name, source, weights)
        module, tokenizer = open_folder(folder, seed=seed)
        length = min(tokenizer.model_max_length, module.text_encoder.config.max_position_embeddings)
        tokenize = partial(_tokenize, tokenizer, length)
    return make_teacher(name, module, tokenize, tokenizer, weights=weights, outputs=outputs)


def make_teacher(
    name: str,
    module: Diffusion,
    tokenize: Tokenize,
    tokenizer: Any,
    *,
    weights: str,
    outputs: tuple[str, ...],
) -> Teacher:
    """Make a Teacher from a Diffusion. Images are resized and cropped to the square that the UNet was
    trained on.
    """
    timesteps = len(module.alphas_cumprod)
    plan = parse_outputs(outputs, timesteps)
    check_block(name, module, plan)
    empty = tokenize([""])
    view = describe_view(
        {
            "size": _pixels(module),
            "mean": [0.5] * 3,
            "std": [0.5] * 3,
            "interpolation": "bicubic",
            "resize_mode": "shortest",
            "fill_color": 0,
        }
    )
    with torch.inference_mode():
        fields = fields_of(plan, module, length=empty.shape[1], empty=empty)
    spec = TeacherSpec(
        name=name,
        weights=weights,
        digest=digest_weights(module),
        outputs=join_outputs(plan, timesteps),
        fields=fields,
        view=view,
        tokenizer={
            "kind": type(tokenizer).__name__,
            "context_length": empty.shape[1],
            "vocab_size": int(module.text_encoder.config.vocab_size),
        },
        constants=constants(plan, module),
        inputs=("image", "text", "pairs") if plan.has_pairs else ("image", "text"),
    )
    return Teacher(spec, module, partial(encode, plan=plan, empty=empty), image_view(view), tokenize)


def _pixels(module: Diffusion) -> tuple[int, int]:
    """Return height and width of the images whose latents the UNet was trained on."""
    _, height, width = latent_shape(module)
    factor = 1 if module.vae is None else 2 ** (len(module.vae.config.block_out_channels) - 1)
    return height * factor, width * factor


def _tokenize(tokenizer: Any, length: int, texts: list[str]) -> Int[Tensor, "texts length"]:
    """Return token ids, truncated or padded to `length`, as `encode_prompt` of a pipeline does."""
    return tokenizer(
        texts, padding="max_length", max_length=length, truncation=True, return_tensors="pt"
    ).input_ids


# ----------------------------------------------------------------------------------------------------
# Sources


def _folder(name: str, source: str, weights: str) -> Path:
    """Return the folder of a teacher; from the hub it is downloaded the first time."""
    kind, _, place = source.partition(":")
    if weights != "pretrained" and random_seed(weights) is None:
        if kind == "folder" and place:
            raise UserError(
                f"--weights {weights}: the folder {name} has its own weights; leave --weights away"
            )
        if not Path(weights, "model_index.json").is_file():
            raise UserError(
                f"--weights {weights} is no folder of diffusers with a model_index.json (or write "
                "pretrained, or random:SEED)"
            )
        return Path(weights)
    if kind == "folder":
        folder = Path(place) if place else HOME
        if not Path(folder, "model_index.json").is_file():
            raise UserError(
                f"no {folder}: make sd-tiny with `python -m scripts.teachers.train_sd_tiny`, or pass --weights "
                "FOLDER (of diffusers)"
            )
        return folder
    if weights != "pretrained":
        raise UserError(
            f"--weights {weights} needs an architecture that is known here: try --teacher sd-v1-4"
        )
    return _download(name, place)


def _download(name: str, repository: str) -> Path:
    """Download a snapshot into the hub's cache, without half-precision weights, safety checkers and other
    formats.
    """
    import huggingface_hub

    patterns = ["model_index.json", "tokenizer/*", "*/*config.json"]
    patterns += [
        f"{part}/{file}.safetensors" for part in NEEDED for file in ("diffusion_pytorch_model", "model")
    ]
    try:
        return Path(
            huggingface_hub.snapshot_download(
                repository, allow_patterns=patterns, local_files_only=not hub_answers()
            )
        )
    except Exception as error:
        raise UserError(
            f"cannot get the weights of {name} ({type(error).__name__}: {str(error).splitlines()[0][:120]}). Pass "
            "--weights FOLDER (of diffusers, one you have), --weights random:0 (the same architecture, "
            "untrained), or --teacher sd-tiny"
        ) from error


# ----------------------------------------------------------------------------------------------------
# Components


def open_folder(folder: Path, *, seed: int | None = None) -> tuple[Diffusion, Any]:
    """Return the module and the tokenizer of a diffusers folder; with a seed the same architecture with
    random weights.
    """
    import transformers

    index = read_config(Path(folder, "model_index.json"))
    parts = {part: _class_of(folder, index, part) for part in NEEDED}
    for part, needed in NEEDED.items():
        if parts[part] != needed and (part, parts[part]) != ("vae", None):
            raise UserError(
                f"{folder} has {parts[part] or 'nothing'} as its {part}: a diffusion teacher has {needed}"
            )
    kind = _class_of(folder, index, "tokenizer")
    check_tokenizer_class(kind, f"{folder}/model_index.json, key 'tokenizer'")
    for place in (folder, *(Path(folder, part) for part in (*NEEDED, "scheduler", "tokenizer"))):
        check_folder(place)
    with _explain_errors(folder), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed or 0)
        components = {part: _part(folder, part, seed) for part, kind in parts.items() if kind}
        scheduler = _scheduler(read_config(Path(folder, "scheduler", "scheduler_config.json")))
        reader = getattr(transformers, kind or "AutoTokenizer", transformers.AutoTokenizer)
        tokenizer = reader.from_pretrained(
            Path(folder, "tokenizer"), local_files_only=True, trust_remote_code=False
        )
    return _join(str(folder), components, scheduler), tokenizer


def _class_of(folder: Path, index: dict[str, Any], part: str) -> str | None:
    """Return the class of a part in model_index.json; UserError if it is of a module that is no library of ours."""
    value = index.get(part) or [None, None]
    plain = (
        isinstance(value, list) and len(value) == 2 and all(isinstance(word, str | None) for word in value)
    )
    if not plain or value[0] not in LIBRARIES:
        raise UserError(
            f"{folder}/model_index.json: the key '{part}' is {str(value)[:80]}; only classes of diffusers and "
            "transformers are loaded"
        )
    return value[1]


def random_sd_v1(seed: int) -> tuple[Diffusion, Tokenize, Any]:
    """Return Stable Diffusion v1's architecture with random weights, with CLIP's tokenizer: no download."""
    import open_clip
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        components = {
            "unet": UNet2DConditionModel(**SD_V1["unet"]),
            "text_encoder": CLIPTextModel(CLIPTextConfig(**SD_V1["text_encoder"])),
            "vae": AutoencoderKL(**SD_V1["vae"]),
        }
    tokenizer = open_clip.SimpleTokenizer()
    return _join("sd-v1-4", components, _scheduler(SD_V1["scheduler"])), partial(_as_sd, tokenizer), tokenizer


def _as_sd(tokenizer: Any, texts: list[str]) -> Int[Tensor, "texts length"]:
    """Return open_clip's ids padded with the end-of-text token, as those of Stable Diffusion are, instead
    of zeros.
    """
    ids = tokenizer(texts)
    behind = torch.arange(ids.shape[1]) > ids.argmax(1, keepdim=True)
    return ids.masked_fill(behind, tokenizer.eot_token_id)


def _part(folder: Path, part: str, seed: int | None) -> Any:
    """Load the UNet, VAE or text encoder of a folder in float32."""
    import diffusers
    import transformers

    if part == "text_encoder":
        where = Path(folder, part)
        if seed is not None:
            return transformers.CLIPTextModel(transformers.CLIPTextConfig.from_pretrained(where))
        return transformers.CLIPTextModel.from_pretrained(
            where, use_safetensors=True, local_files_only=True
        ).float()
    kind = getattr(diffusers, NEEDED[part])
    if seed is not None:
        return kind.from_config(kind.load_config(folder, subfolder=part))
    how = {"use_safetensors": True, "local_files_only": True, "low_cpu_mem_usage": False}
    return kind.from_pretrained(folder, subfolder=part, **how).float()


def _scheduler(config: dict[str, Any]) -> Any:
    """Return the noise schedule of any scheduler's configuration as a DDPMScheduler."""
    from diffusers import DDPMScheduler

    names = (
        "num_train_timesteps",
        "beta_start",
        "beta_end",
        "beta_schedule",
        "trained_betas",
        "prediction_type",
        "rescale_betas_zero_snr",
    )
    return DDPMScheduler(**{name: config[name] for name in names if config.get(name) is not None})


def _join(name: str, components: dict[str, Any], scheduler: Any) -> Diffusion:
    """Join the parts to one module; raise UserError if they do not fit together."""
    unet, vae, text_encoder = components["unet"], components.get("vae"), components["text_encoder"]
    prediction, channels = scheduler.config.prediction_type, unet.config.in_channels
    latents = 3 if vae is None else vae.config.latent_channels
    wrong = ""
    if prediction not in PREDICTIONS:
        wrong = f"its UNet predicts '{prediction}', not {' or '.join(PREDICTIONS)}"
    elif (channels, unet.config.out_channels) != (latents, latents):
        wrong = f"its UNet maps {channels} channels to {unet.config.out_channels}, its latents have {latents}"
    elif (
        unet.config.cross_attention_dim != text_encoder.config.hidden_size or unet.config.addition_embed_type
    ):
        wrong = "its UNet reads more than, or other than, the text encoder's states"
    elif unet.config.sample_size is None:
        wrong = "its UNet does not say its sample_size"
    if wrong:
        raise UserError(f"{name} is not a diffusion teacher that is known here: {wrong}")
    return Diffusion(unet, vae, text_encoder, alphas_cumprod=scheduler.alphas_cumprod, prediction=prediction)


@contextlib.contextmanager
def _explain_errors(folder: Path) -> Iterator[None]:
    """Turn the exceptions of libraries about an unreadable folder into a UserError, and hide their
    progress bars.
    """
    try:
        with quiet_transformers(hints=True):
            yield
    except UserError:
        raise
    except Exception as error:
        reason = " ".join(str(error).split())[:160]
        raise UserError(
            f"{folder} is not readable as a diffusers folder ({type(error).__name__}: {reason})"
        ) from error
