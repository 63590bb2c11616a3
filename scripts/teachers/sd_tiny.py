"""A diffusion teacher of drawn scenes, a few MB: its scenes, its parts, its diffusers folder, and whether it binds.

Not the training: scripts/teachers/train_sd_tiny.py. The parts are diffusers' and transformers' own classes, only small.
"""

import copy
import json
import random
import shutil
import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw

from scripts.datasets import scenes as prepare_scenes

SIDE = 64  # pixels; latents are 8 times smaller
NUM_TOKENS = 16  # the longest caption has 13 words, and two marks
WORDS_BESIDE = ("a", "an", "the", "is", "there", "in", "picture", "of", "left", "right", "above", "below")
MARKS = ("<end>", "<start>", "<unknown>")  # ids 0, 1, 2; the end also pads, as in CLIP's tokenizer
HELD_OUT_SEEDS = (1, 2)  # test and validation sets: no pair that they describe is trained on
HELD_OUT_SCENES = 5000  # of each of those seeds
SINGLES = 1 / 3  # the part of the one-object scenes that is kept: what binds is learnt from pairs

UNET = {"block_out_channels": (64, 96), "norm_num_groups": 16, "attention_head_dim": 4}
VAE = {"block_out_channels": (16, 16, 32, 64), "norm_num_groups": 4, "latent_channels": 8}
TEXT = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 3, "num_attention_heads": 4}
SIZES = {"unet": UNET, "vae": VAE, "text": TEXT}


# --- the scenes -----------------------------------------------------------------------------------


def held_out_keys() -> set[str]:
    """What the two-object scenes of the test and validation seeds say."""
    keys = set()
    for seed in HELD_OUT_SEEDS:
        for _, _, scene in undrawn(HELD_OUT_SCENES, seed):
            if scene["relation"] is not None:
                keys.add(prepare_scenes.description_key(scene))
    return keys


def undrawn(num: int, seed: int) -> Iterator[tuple[int, list[str], dict[str, Any]]]:
    """As `prepare_scenes.generate` at SIDE pixels, (i, captions, scene), without the picture, which takes the time."""
    for i in range(num):
        rng = random.Random(f"{seed}-{i}")
        scene = prepare_scenes.draw_scene_values(rng)
        yield i, prepare_scenes.captions_of(scene, rng), scene


def choose_scenes(num: int, *, seed: int, held_out: set[str]) -> list[tuple[list[str], dict]]:
    """(captions, scene) of `num` scenes: pairs that are not held out, and a third of the single objects."""
    chosen: list[tuple[list[str], dict]] = []
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


def draw(scenes: list[dict]) -> torch.Tensor:
    """The scenes as uint8 pictures [n, 3, SIDE, SIDE]."""
    drawn = [np.asarray(prepare_scenes.render(scene, SIDE)) for scene in scenes]
    return torch.from_numpy(np.stack(drawn)).permute(0, 3, 1, 2).contiguous()


def as_input(pictures: torch.Tensor) -> torch.Tensor:
    """uint8 pictures as floats in [-1, 1]."""
    return pictures.float() / 127.5 - 1


# --- the parts ------------------------------------------------------------------------------------


def make_tokenizer() -> Any:
    """One token per scene word, in lower case, punctuation left out; a fast tokenizer as transformers saves it."""
    from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    scene_words = (
        *prepare_scenes.COLOURS,
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


def tokenize(tokenizer: Any, texts: list[str]) -> torch.Tensor:
    """Token ids [n, NUM_TOKENS], padded as StableDiffusionPipeline does."""
    padding = {"padding": "max_length", "truncation": True, "max_length": NUM_TOKENS}
    return tokenizer(texts, return_tensors="pt", **padding).input_ids


def make_vae(sizes: dict) -> Any:
    """An AutoencoderKL with f = 8."""
    from diffusers import AutoencoderKL

    depth = len(sizes["block_out_channels"])
    blocks = {
        "down_block_types": ["DownEncoderBlock2D"] * depth,
        "up_block_types": ["UpDecoderBlock2D"] * depth,
    }
    # The latents are whitened per channel inside (see `whiten`), so the scale of the pipeline is 1.
    common = {
        "layers_per_block": 1,
        "sample_size": SIDE,
        "mid_block_add_attention": False,
        "scaling_factor": 1.0,
    }
    vae = AutoencoderKL(**blocks, **common, **sizes)
    start_near_identity(vae)
    return vae


@torch.no_grad()
def start_near_identity(vae: Any) -> None:
    """Lets colours pass from the first step: without this the reconstructions stay colourless for long."""
    passing = ("samplers.0.conv", "conv_shortcut", "coder.conv_in", "coder.conv_out", "quant_conv")
    for name, layer in vae.named_modules():
        if not isinstance(layer, torch.nn.Conv2d):
            continue
        if name.endswith(passing):
            layer.weight.mul_(0.5).add_(torch.nn.init.dirac_(torch.empty_like(layer.weight)))
        elif name.endswith("conv2"):
            layer.weight.mul_(0.2)


def make_unet(sizes: dict, channels: int, width: int) -> Any:
    """A UNet2DConditionModel with cross-attention in every block."""
    from diffusers import UNet2DConditionModel

    depth = len(sizes["block_out_channels"])
    blocks = {
        "down_block_types": ["CrossAttnDownBlock2D"] * depth,
        "up_block_types": ["CrossAttnUpBlock2D"] * depth,
    }
    latents = {"sample_size": SIDE // 8, "in_channels": channels, "out_channels": channels}
    return UNet2DConditionModel(**blocks, **latents, layers_per_block=1, cross_attention_dim=width, **sizes)


def make_text_encoder(sizes: dict, num_words: int) -> Any:
    """A CLIPTextModel, only small; trained from nothing together with the UNet."""
    from transformers import CLIPTextConfig, CLIPTextModel

    ids = {"eos_token_id": 0, "pad_token_id": 0, "bos_token_id": 1}
    shape = {"vocab_size": num_words, "max_position_embeddings": NUM_TOKENS}
    return CLIPTextModel(CLIPTextConfig(**shape, **ids, **sizes, attn_implementation="eager"))


def make_scheduler() -> Any:
    """Stable Diffusion's schedule, epsilon-prediction; DDIM, so that the pipeline samples in few steps."""
    from diffusers import DDIMScheduler

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
def whiten(vae: Any, pictures: torch.Tensor) -> None:
    """Folds (z - mean) / std per channel into the 1x1 convolutions around the latents, from the pictures' latents."""
    latents = encode(vae, pictures)
    mean, std = latents.mean((0, 2, 3)), latents.std((0, 2, 3))
    before, after = vae.quant_conv, vae.post_quant_conv
    num = len(mean)
    before.bias[:num] = (before.bias[:num] - mean) / std
    before.weight[:num] /= std[:, None, None, None]
    before.bias[num:] -= 2 * std.log()  # the posterior's log-variance
    after.bias += (after.weight[:, :, 0, 0] * mean).sum(1)
    after.weight *= std[None, :, None, None]


@torch.no_grad()
def encode(vae: Any, pictures: torch.Tensor, *, batch: int = 100) -> torch.Tensor:
    """The posterior's means [n, c, h, w] of uint8 pictures, float32."""
    return torch.cat([vae.encode(as_input(part)).latent_dist.mode() for part in pictures.split(batch)])


# --- the folder -----------------------------------------------------------------------------------


def save_folder(out: Path, *, vae: Any, unet: Any, text_encoder: Any, tokenizer: Any, about: dict) -> None:
    """Writes the folder that StableDiffusionPipeline opens, in float16, with `about` as its training.json."""
    from diffusers import StableDiffusionPipeline

    parts = {"vae": vae, "unet": unet, "text_encoder": text_encoder}
    parts = {name: copy.deepcopy(part).half() for name, part in parts.items()}
    pipeline = StableDiffusionPipeline(
        **parts,
        tokenizer=tokenizer,
        scheduler=make_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    partial = out.with_name(out.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    pipeline.save_pretrained(partial, safe_serialization=True)
    for name in ("model_index.json", "tokenizer/tokenizer_config.json"):
        path = (
            partial / name
        )  # transformers 5 writes a name that transformers 4 does not know; both know the old one
        path.write_text(path.read_text().replace("TokenizersBackend", "PreTrainedTokenizerFast"))
    (partial / "training.json").write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")
    shutil.rmtree(out, ignore_errors=True)
    partial.rename(out)


def load_folder(folder: Path) -> Any:
    """The pipeline of a folder, in float32, without its own progress bar."""
    from diffusers import StableDiffusionPipeline

    pipeline = StableDiffusionPipeline.from_pretrained(folder, safety_checker=None)
    pipeline.text_encoder.float()  # transformers keeps the file's float16; diffusers has made the others float32
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


# --- does it bind? --------------------------------------------------------------------------------


def wrong_captions(scene: dict) -> dict[str, str]:
    """A pair's caption with colours swapped, objects swapped (so the relation is reversed), one colour changed."""
    first, second = scene["objects"]
    colours = [
        name for name in sorted(prepare_scenes.COLOURS) if name not in (first["colour"], second["colour"])
    ]
    other = colours[(len(first["shape"]) + 3 * len(second["shape"])) % len(colours)]
    swapped = [first | {"colour": second["colour"]}, second | {"colour": first["colour"]}]
    return {
        "colours_swapped": pair_caption(swapped, scene["relation"]),
        "objects_swapped": pair_caption([second, first], scene["relation"]),
        "one_colour": pair_caption([first | {"colour": other}, second], scene["relation"]),
    }


def pair_caption(objects: list[dict], relation: str) -> str:
    """A pair's first caption in the words of prepare_scenes."""
    first, second = (prepare_scenes.article(prepare_scenes.describe(thing)) for thing in objects)
    return prepare_scenes.capital(f"{first} {relation} {second}.")


def check_scenes(num: int, *, seed: int = 2) -> list[tuple[str, dict]]:
    """(true caption, scene) of `num` scenes of two objects that differ in colour and in what else can be said."""
    found: list[tuple[str, dict]] = []
    for _, captions, scene in undrawn(100 * num, seed):
        objects = scene["objects"]
        if len(objects) == 2 and objects[0]["colour"] != objects[1]["colour"] and len(found) < num:
            same = [{**thing, "colour": "", "centre": ""} for thing in objects]
            found += [(captions[0], scene)] if same[0] != same[1] else []
        if len(found) == num:
            break
    return found


@torch.no_grad()
def check(
    vae: Any, unet: Any, text_encoder: Any, tokenizer: Any, *, num: int = 200, draws: int = 16
) -> dict[str, Any]:
    """Accuracies: the part of `num` held-out pairs whose true caption has the strictly lower error than each wrong one.

    All captions of a picture share the same (t, eps), t evenly over [100, 900].
    """
    scenes = check_scenes(num)
    latents = encode(vae, draw([scene for _, scene in scenes]))
    texts = [[caption, *wrong_captions(scene).values()] for caption, scene in scenes]
    names = list(wrong_captions(scenes[0][1]))
    abar = make_scheduler().alphas_cumprod
    t = torch.linspace(100, 900, draws).round().long()
    noise = torch.randn(draws, *latents.shape[1:], generator=torch.Generator().manual_seed(0))
    a = abar[t].view(-1, 1, 1, 1)
    errors = []
    for z, captions in zip(latents, texts, strict=True):
        noised = a.sqrt() * z + (1 - a).sqrt() * noise  # [S,c,h,w]
        states = text_encoder(tokenize(tokenizer, captions))[0]  # [K,L,D]
        k = len(captions)
        predicted = unet(noised.repeat(k, 1, 1, 1), t.repeat(k), states.repeat_interleave(draws, 0)).sample
        errors.append((predicted - noise.repeat(k, 1, 1, 1)).square().reshape(k, -1).mean(1))
    return accuracies(torch.stack(errors), names) | {"num": num, "draws": draws}


def accuracies(errors: torch.Tensor, names: list[str]) -> dict[str, float]:
    """Of errors [n, 1 + K], the true caption's first: how often it is strictly lower than each; ties are misses."""
    hits = errors[:, :1] < errors[:, 1:]  # [n,K]
    rows = {name: round(hits[:, i].float().mean().item(), 4) for i, name in enumerate(names)}
    return rows | {"all": round(hits.all(1).float().mean().item(), 4)}


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


def sample(pipeline: Any, prompts: Sequence[str], *, seed: int = 0, num_steps: int = 30) -> list[Image.Image]:
    """One picture per prompt, DDIM with guidance 3."""
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


def sample_grid(pipeline: Any, *, rows: int = 3, scale: int = 2) -> Image.Image:
    """`rows` samples of each of PROMPTS in a column, the caption under them."""
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
