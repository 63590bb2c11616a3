"""Build, save, check and sample sd-tiny, a diffusion teacher of drawn scenes with a size of a few MB.

Its models are small instances of the classes of diffusers and transformers. scripts/teachers/train_sd_tiny.py trains it.
"""

import copy
import json
import random
import shutil
import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image, ImageDraw

from scripts.datasets import scenes as prepare_scenes
from scripts.datasets.scenes import Scene

if TYPE_CHECKING:
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
    from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline
    from diffusers.schedulers.scheduling_ddim import DDIMScheduler
    from transformers import CLIPTextModel, PreTrainedTokenizerFast

SIDE = 64  # pixels; latents are 8 times smaller
NUM_TOKENS = 16  # the longest caption has 13 words and two special tokens
WORDS_BESIDE = ("a", "an", "the", "is", "there", "in", "picture", "of", "left", "right", "above", "below")
MARKS = (
    "<end>",
    "<start>",
    "<unknown>",
)  # ids 0, 1, 2; the end token is also padding, as in CLIP's tokenizer
HELD_OUT_SEEDS = (1, 2)  # test and validation sets, whose pairs are excluded from training
HELD_OUT_SCENES = 5000  # scenes per held-out seed
SINGLES = 1 / 3  # fraction of one-object scenes to keep: binding is learned from pairs

UNET: dict[str, Any] = {"block_out_channels": (64, 96), "norm_num_groups": 16, "attention_head_dim": 4}
VAE: dict[str, Any] = {"block_out_channels": (16, 16, 32, 64), "norm_num_groups": 4, "latent_channels": 8}
TEXT: dict[str, Any] = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
}
SIZES = {"unet": UNET, "vae": VAE, "text": TEXT}


# --- the scenes -----------------------------------------------------------------------------------


def held_out_keys() -> set[str]:
    """Return the description keys of the two-object scenes of the test and validation seeds."""
    keys = set()
    for seed in HELD_OUT_SEEDS:
        for _, _, scene in undrawn(HELD_OUT_SCENES, seed):
            if scene["relation"] is not None:
                keys.add(prepare_scenes.description_key(scene))
    return keys


def undrawn(num: int, seed: int) -> Iterator[tuple[int, list[str], Scene]]:
    """Yield (i, captions, scene) of `scenes.generate` without drawing the pictures, which is slow."""
    for i in range(num):
        rng = random.Random(f"{seed}-{i}")
        scene = prepare_scenes.draw_scene_values(rng)
        yield i, prepare_scenes.captions_of(scene, rng), scene


def choose_scenes(num: int, *, seed: int, held_out: set[str]) -> list[tuple[list[str], Scene]]:
    """Return (captions, scene) of `num` training scenes: pairs that are not held out, and a third of the singles."""
    chosen: list[tuple[list[str], Scene]] = []
    singles = 0
    for _, captions, scene in undrawn(100 * num + 100, seed):
        if scene["relation"] is None:
            singles += 1
            keep = singles % round(1 / SINGLES) == 0
        else:
            keep = prepare_scenes.description_key(scene) not in held_out
        chosen += [(captions, scene)] if keep else []
        if len(chosen) == num:
            break
    return chosen


def draw(scenes: list[Scene]) -> torch.Tensor:
    """Draw scenes as uint8 pictures [n, 3, SIDE, SIDE]."""
    drawn = [np.asarray(prepare_scenes.render(scene, SIDE)) for scene in scenes]
    return torch.from_numpy(np.stack(drawn)).permute(0, 3, 1, 2).contiguous()


def as_input(pictures: torch.Tensor) -> torch.Tensor:
    """Convert uint8 pictures to floats in [-1, 1]."""
    return pictures.float() / 127.5 - 1


# --- the models -----------------------------------------------------------------------------------


def make_tokenizer() -> "PreTrainedTokenizerFast":
    """Build a tokenizer with one token per lower-case word of the captions. Punctuation is removed."""
    from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    scene_words = (
        *prepare_scenes.COLORS,
        *prepare_scenes.SHAPES,
        *prepare_scenes.SIZES,
        *prepare_scenes.TEXTURES,
    )
    end, start, unknown = MARKS
    words = [*MARKS, *WORDS_BESIDE, *scene_words]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token=unknown))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Lowercase(), normalizers.Replace(Regex("[^a-z ]"), " ")]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    marks = [(end, 0), (start, 1)]
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{start} $A {end}", special_tokens=marks)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_max_length=NUM_TOKENS,
        pad_token=end,
        eos_token=end,
        bos_token=start,
        unk_token=unknown,
    )


def tokenize(tokenizer: "PreTrainedTokenizerFast", texts: list[str]) -> torch.Tensor:
    """Return token ids [n, NUM_TOKENS], padded as in StableDiffusionPipeline."""
    padding = {"padding": "max_length", "truncation": True, "max_length": NUM_TOKENS}
    return tokenizer(texts, return_tensors="pt", **padding).input_ids


def make_vae(sizes: dict[str, Any]) -> "AutoencoderKL":
    """Build an autoencoder with f = 8."""
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

    depth = len(sizes["block_out_channels"])
    blocks: dict[str, Any] = {
        "down_block_types": ["DownEncoderBlock2D"] * depth,
        "up_block_types": ["UpDecoderBlock2D"] * depth,
    }
    # `whiten` scales the latents inside the autoencoder, so the scaling factor of the pipeline is 1
    common: dict[str, Any] = {
        "layers_per_block": 1,
        "sample_size": SIDE,
        "mid_block_add_attention": False,
        "scaling_factor": 1.0,
    }
    vae = AutoencoderKL(**blocks, **common, **sizes)
    start_near_identity(vae)
    return vae


@torch.no_grad()
def start_near_identity(vae: torch.nn.Module) -> None:
    """Initialize the autoencoder near the identity. Otherwise reconstructions stay colorless for many steps."""
    passing = ("samplers.0.conv", "conv_shortcut", "coder.conv_in", "coder.conv_out", "quant_conv")
    for name, layer in vae.named_modules():
        if not isinstance(layer, torch.nn.Conv2d):
            continue
        if name.endswith(passing):
            layer.weight.mul_(0.5).add_(torch.nn.init.dirac_(torch.empty_like(layer.weight)))
        elif name.endswith("conv2"):
            layer.weight.mul_(0.2)


def make_unet(sizes: dict[str, Any], channels: int, width: int) -> "UNet2DConditionModel":
    """Build a UNet with cross-attention in every block.

    Args:
        sizes: keyword arguments of UNet2DConditionModel.
        channels: channels of the latents.
        width: width of the text states.
    """
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel

    depth = len(sizes["block_out_channels"])
    blocks: dict[str, Any] = {
        "down_block_types": ["CrossAttnDownBlock2D"] * depth,
        "up_block_types": ["CrossAttnUpBlock2D"] * depth,
    }
    latents: dict[str, Any] = {"sample_size": SIDE // 8, "in_channels": channels, "out_channels": channels}
    return UNet2DConditionModel(**blocks, **latents, layers_per_block=1, cross_attention_dim=width, **sizes)


def make_text_encoder(sizes: dict[str, Any], num_words: int) -> "CLIPTextModel":
    """Build a small text encoder, which is trained from scratch together with the UNet."""
    from transformers import CLIPTextConfig, CLIPTextModel

    values: dict[str, Any] = {"eos_token_id": 0, "pad_token_id": 0, "bos_token_id": 1}
    values |= {"vocab_size": num_words, "max_position_embeddings": NUM_TOKENS}
    values |= {"attn_implementation": "eager"}
    return CLIPTextModel(CLIPTextConfig(**values, **sizes))


def make_scheduler() -> "DDIMScheduler":
    """Build the noise schedule of Stable Diffusion with epsilon prediction. DDIM samples in few steps."""
    from diffusers.schedulers.scheduling_ddim import DDIMScheduler

    return DDIMScheduler(
        num_train_timesteps=1000,
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        prediction_type="epsilon",
    )


@torch.no_grad()
def whiten(vae: "AutoencoderKL", pictures: torch.Tensor) -> None:
    """Fold (z - mean) / std per channel into the 1x1 convolutions around the latents.

    Mean and standard deviation are those of the latents of `pictures`, uint8 [n, 3, SIDE, SIDE].
    """
    latents = encode(vae, pictures)
    mean, std = latents.mean((0, 2, 3)), latents.std((0, 2, 3))
    before, after = vae.quant_conv, vae.post_quant_conv
    assert before is not None
    assert before.bias is not None
    assert after is not None
    assert after.bias is not None
    num = len(mean)
    before.bias[:num] = (before.bias[:num] - mean) / std
    before.weight[:num] /= std[:, None, None, None]
    before.bias[num:] -= 2 * std.log()  # the posterior's log-variance
    after.bias += (after.weight[:, :, 0, 0] * mean).sum(1)
    after.weight *= std[None, :, None, None]


@torch.no_grad()
def encode(vae: "AutoencoderKL", pictures: torch.Tensor, *, batch: int = 100) -> torch.Tensor:
    """Return the means of the posterior of uint8 pictures, float32 [n, c, h, w]."""
    return torch.cat([vae.encode(as_input(chunk)).latent_dist.mode() for chunk in pictures.split(batch)])


# --- the folder -----------------------------------------------------------------------------------


def save_folder(
    out: Path,
    *,
    vae: "AutoencoderKL",
    unet: "UNet2DConditionModel",
    text_encoder: "CLIPTextModel",
    tokenizer: "PreTrainedTokenizerFast",
    about: dict[str, Any],
) -> None:
    """Write a folder of StableDiffusionPipeline in float16, with `about` as its training.json."""
    from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline

    models: dict[str, Any] = {"vae": vae, "unet": unet, "text_encoder": text_encoder}
    models = {name: copy.deepcopy(model).half() for name, model in models.items()}
    components = models | {"tokenizer": tokenizer, "scheduler": make_scheduler()}
    components |= {"safety_checker": None, "feature_extractor": None}
    pipeline = StableDiffusionPipeline(**components, requires_safety_checker=False)
    partial = out.with_name(out.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    pipeline.save_pretrained(partial, safe_serialization=True)
    for name in ("model_index.json", "tokenizer/tokenizer_config.json"):
        # transformers 5 writes a class name that transformers 4 lacks; both load the old name
        path = partial / name
        path.write_text(path.read_text().replace("TokenizersBackend", "PreTrainedTokenizerFast"))
    (partial / "training.json").write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")
    shutil.rmtree(out, ignore_errors=True)
    partial.rename(out)


def load_folder(folder: Path) -> "StableDiffusionPipeline":
    """Load the pipeline of a folder in float32, without its progress bar."""
    from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline

    pipeline = StableDiffusionPipeline.from_pretrained(folder, safety_checker=None)
    pipeline.text_encoder.float()  # transformers keeps float16; diffusers converts the other models to float32
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


# --- samples --------------------------------------------------------------------------------------

PROMPTS = (
    "A red circle.",
    "A large striped blue star.",
    "A small dotted green heart.",
    "A checked purple hexagon.",
    "A red circle left of a blue square.",
    "A blue circle left of a red square.",
    "A blue square left of a red circle.",
    "A yellow star above a green heart.",
    "A large pink ring below a small brown triangle.",
    "A cyan cross right of an orange diamond.",
    "A large striped gray rectangle above a purple star.",
    "There is a small dotted orange hexagon in the picture.",
)


def sample(
    pipeline: "StableDiffusionPipeline", prompts: Sequence[str], *, seed: int = 0, num_steps: int = 30
) -> list[Image.Image]:
    """Sample one picture per prompt by DDIM with guidance 3."""
    generators = [torch.Generator().manual_seed(1000 * seed + i) for i in range(len(prompts))]
    out = pipeline(
        list(prompts),
        height=SIDE,
        width=SIDE,
        num_inference_steps=num_steps,
        guidance_scale=3.0,
        generator=generators,
    )
    return out.images


def sample_grid(pipeline: "StableDiffusionPipeline", *, rows: int = 3, scale: int = 2) -> Image.Image:
    """Draw `rows` samples of each prompt in a column with the prompt below."""
    side, gap, height = SIDE * scale, 12, 44
    columns, num = 6, len(PROMPTS)
    blocks = -(-num // columns)
    grid = Image.new(
        "RGB", (columns * (side + gap) + gap, blocks * (rows * (side + 4) + height) + gap), "white"
    )
    pen = ImageDraw.Draw(grid)
    drawn = [sample(pipeline, PROMPTS, seed=row) for row in range(rows)]
    for i, prompt in enumerate(PROMPTS):
        x, y = gap + i % columns * (side + gap), gap + i // columns * (rows * (side + 4) + height)
        for row in range(rows):
            grid.paste(
                drawn[row][i].resize((side, side), Image.Resampling.BICUBIC), (x, y + row * (side + 4))
            )
        pen.multiline_text(
            (x, y + rows * (side + 4)), "\n".join(textwrap.wrap(prompt, 22)), fill="black", spacing=1
        )
    return grid
