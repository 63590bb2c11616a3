"""Measure whether a diffusion model binds colors to shapes and sides to objects, on held-out pairs of drawn scenes."""

from typing import TYPE_CHECKING, Any

import torch

from scripts.datasets import scenes as prepare_scenes
from scripts.datasets.scenes import Scene, Thing
from scripts.teachers.sd_tiny import draw, encode, make_scheduler, tokenize, undrawn

if TYPE_CHECKING:
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
    from transformers import CLIPTextModel, PreTrainedTokenizerFast


def wrong_captions(scene: Scene) -> dict[str, str]:
    """Return false captions of a pair: colors swapped, objects swapped (relation reversed), one color changed."""
    first, second = scene["objects"]
    colors = [name for name in sorted(prepare_scenes.COLORS) if name not in (first["color"], second["color"])]
    other = colors[(len(first["shape"]) + 3 * len(second["shape"])) % len(colors)]
    swapped = [first | {"color": second["color"]}, second | {"color": first["color"]}]
    return {
        "colours_swapped": pair_caption(swapped, scene["relation"]),
        "objects_swapped": pair_caption([second, first], scene["relation"]),
        "one_colour": pair_caption([first | {"color": other}, second], scene["relation"]),
    }


def pair_caption(objects: list[Thing], relation: str) -> str:
    """Return the first caption of a pair in the phrasing of `scenes.captions_of`."""
    first, second = (prepare_scenes.article(prepare_scenes.describe(thing)) for thing in objects)
    return prepare_scenes.capital(f"{first} {relation} {second}.")


def check_scenes(num: int, *, seed: int = 2) -> list[tuple[str, Scene]]:
    """Return (true caption, scene) of `num` pairs whose objects differ in color and in another attribute."""
    pairs: list[tuple[str, Scene]] = []
    for _, captions, scene in undrawn(100 * num, seed):
        objects = scene["objects"]
        if len(objects) == 2 and objects[0]["color"] != objects[1]["color"] and len(pairs) < num:
            others = [{**thing, "color": "", "center": ""} for thing in objects]
            pairs += [(captions[0], scene)] if others[0] != others[1] else []
        if len(pairs) == num:
            break
    return pairs


@torch.no_grad()
def check(
    vae: "AutoencoderKL",
    unet: "UNet2DConditionModel",
    text_encoder: "CLIPTextModel",
    tokenizer: "PreTrainedTokenizerFast",
    *,
    num: int = 200,
    draws: int = 16,
) -> dict[str, Any]:
    """Measure how often the true caption has a strictly lower denoising error than each wrong caption.

    Args:
        vae: autoencoder.
        unet: denoiser.
        text_encoder: text encoder of the denoiser.
        tokenizer: tokenizer of the text encoder.
        num: number of held-out pairs.
        draws: number of (t, eps) per picture, shared by all captions; t is evenly spaced over [100, 900].

    Returns:
        Accuracy against each kind of wrong caption and against all, with `num` and `draws`.
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
    """Return how often the true caption has the strictly lower error. Ties are misses.

    Args:
        errors: [n, 1 + K]; the first column belongs to the true caption.
        names: names of the K wrong captions.
    """
    hits = errors[:, :1] < errors[:, 1:]  # [n,K]
    rows = {name: round(hits[:, i].float().mean().item(), 4) for i, name in enumerate(names)}
    return rows | {"all": round(hits.all(1).float().mean().item(), 4)}
