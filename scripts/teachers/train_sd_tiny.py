"""Train the tiny diffusion teacher `sd-tiny` on drawn scenes: an autoencoder, then a UNet with its text encoder.

    python -m scripts.teachers.train_sd_tiny --out models/sd_tiny
    python -m scripts.teachers.train_sd_tiny --out models/sd_tiny --check --samples docs/sd_tiny_samples.png

The result is a complete latent diffusion model whose denoising error depends on which color belongs to which object.
Sample quality is secondary. Training takes one to two hours on one CPU core and resumes after an interruption. The second
command checks and samples an existing folder.
"""

import argparse
import copy
import json
import math
import shutil
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from scripts.teachers import sd_tiny
from scripts.teachers.sd_tiny_binding import check as check_binding
from scripts.teachers.training_loop import Stage, State, train_loop
from teachercache.core.errors import UserError
from teachercache.core.paths import stream_whole
from teachercache.core.progress import say, ticker

if TYPE_CHECKING:
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
    from transformers import CLIPTextModel

CHECK_EVERY = 500  # steps between evaluations of the binding; the folder is rewritten at each of them
# (first step, low, high, power): most draws have t in [low, high), and errors are weighted by abar ** power. Colors and
# shapes are learned first, at timesteps where they are ambiguous. Positions are ambiguous only at high noise.
RANGES = ((0, 250, 850, 0.0), (1750, 450, 950, -0.5), (2750, 750, 1000, -0.5))
WHITENED = 500  # pictures for the mean and scale of the latent channels


@dataclass(frozen=True)
class Settings:
    """Everything that the weights depend on."""

    scenes: int = 16_000
    steps: int = 4000
    vae_steps: int = 1000
    seed: int = 1000  # 0 to 3 are the seeds of the demo, the test, the validation sets and the vanilla CLIP
    batch: int = 32
    vae_batch: int = 8
    lr: float = 1e-3
    vae_lr: float = 2e-3
    warmup: int = 100
    # Fraction of the steps with a constant learning rate, so that --steps can be raised. A cosine to 0 follows.
    decay_from: float = 0.8
    ema: float = 0.998
    vae_ema: float = 0.99
    kl: float = 1e-5  # weight of the KL per latent element, relative to the squared error per value
    first_caption: float = 0.85  # probability of the caption that names everything; otherwise the second one
    dropout: float = 0.1  # probability of replacing a caption by "", for guidance and for d(x, "")
    ranged: float = 0.6  # fraction of the draws with t in the range of RANGES; the others cover all t


# --- the data ---------------------------------------------------------------------------------------


def scene_pictures(settings: Settings, work: Path) -> tuple[torch.Tensor, list[list[str]]]:
    """Return the pictures, uint8 [n, 3, 64, 64], and all captions.

    If the latents are cached, only the pictures for `whiten` are drawn.
    """
    held_out = sd_tiny.held_out_keys()
    chosen = sd_tiny.choose_scenes(settings.scenes, seed=settings.seed, held_out=held_out)
    drawn = chosen[:WHITENED] if (work / "latents.pt").exists() else chosen
    return sd_tiny.draw([scene for _, scene in drawn]), [captions for captions, _ in chosen]


def latents_of(vae: "AutoencoderKL", pictures: torch.Tensor) -> torch.Tensor:
    """Encode all pictures to latents [n, c, 8, 8] with a progress bar."""
    latents = []
    with ticker(len(pictures), "pictures", "encoding") as tick:
        for batch in pictures.split(100):
            latents.append(sd_tiny.encode(vae, batch))
            tick.step(len(batch))
    return torch.cat(latents)


def range_at(step: int) -> tuple[int, int, float]:
    """Return (low, high, power) of RANGES at a step."""
    return next(row[1:] for row in reversed(RANGES) if step >= row[0])


def draws_of(
    settings: Settings, step: int, ids: torch.Tensor, latents: torch.Tensor
) -> tuple[torch.Tensor, ...]:
    """Sample the batch of a step. It depends only on the seed and the step.

    Args:
        settings: seed, batch size and probabilities.
        step: number of the step.
        ids: token ids of both captions of each row, [rows + 1, 2, length]; the last row is the empty caption.
        latents: latents of each row, [rows, c, h, w].

    Returns:
        Latents [n, c, h, w], token ids [n, length], timesteps [n] and noise [n, c, h, w].
    """
    generator = torch.Generator().manual_seed(settings.seed * 1_000_003 + step)
    n = settings.batch
    rows = torch.randint(len(latents), (n,), generator=generator)
    which = (torch.rand(n, generator=generator) >= settings.first_caption).long()
    empty = torch.rand(n, generator=generator) < settings.dropout
    low, high, _ = range_at(step)
    t = torch.where(
        torch.rand(n, generator=generator) < settings.ranged,
        torch.randint(low, high, (n,), generator=generator),
        torch.randint(0, 1000, (n,), generator=generator),
    )
    noise = torch.randn(n, *latents.shape[1:], generator=generator)
    return latents[rows].float(), ids[torch.where(empty, len(ids) - 1, rows), which], t, noise


# --- the two stages ---------------------------------------------------------------------------------


def use_channels_last(module: torch.nn.Module) -> None:
    """Convert the weights to the channels_last memory format, which is faster on the CPU."""
    module.to(memory_format=torch.channels_last)


def train_vae(
    settings: Settings, sizes: dict[str, Any], pictures: torch.Tensor, work: Path
) -> tuple["AutoencoderKL", dict[str, Any]]:
    """Train the autoencoder and whiten its latents.

    The loss is the squared error, a tenth of the absolute error and a small KL term.
    """
    torch.manual_seed(settings.seed)
    vae = sd_tiny.make_vae(sizes)
    use_channels_last(vae)

    def loss_at(step: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(settings.seed * 1_000_003 + step)
        rows = torch.randint(len(pictures), (settings.vae_batch,), generator=generator)
        x = sd_tiny.as_input(pictures[rows]).contiguous(memory_format=torch.channels_last)
        with torch.autocast("cpu", torch.bfloat16):
            posterior = vae.encode(x).latent_dist
            z = posterior.sample(generator=generator)
            error = vae.decode(z).sample.float() - x
        kl = posterior.kl().float().mean() / z[0].numel()
        return error.square().mean() + 0.1 * error.abs().mean() + settings.kl * kl

    stage = Stage(
        title="autoencoder",
        steps=settings.vae_steps,
        peak=settings.vae_lr,
        warmup=settings.warmup,
        decay_from=settings.decay_from,
        ema=settings.vae_ema,
        checkpoint=work / "vae.pt",
    )
    state = train_loop(vae, loss_at, stage)
    vae.load_state_dict(state["ema"])
    vae.eval().requires_grad_(False)
    sd_tiny.whiten(vae, pictures[:WHITENED])
    with torch.no_grad():
        sample = pictures[:200]
        error = vae.decode(sd_tiny.encode(vae, sample)).sample.clamp(-1, 1) - sd_tiny.as_input(sample)
    psnr = 10 * math.log10(4 / error.square().mean().item())
    say(f"autoencoder: PSNR {psnr:.1f} dB after {settings.vae_steps} steps")
    return vae, {"psnr_db": round(psnr, 2), "seconds": round(state["seconds"]), "losses": state["losses"]}


def cached_latents(vae: "AutoencoderKL", pictures: torch.Tensor, work: Path) -> torch.Tensor:
    """Return `latents_of` in float16 from the cache in the work folder."""
    path = work / "latents.pt"
    if not path.exists():
        latents = latents_of(vae, pictures).half()
        stream_whole(path, lambda file: torch.save(latents, file))
    return torch.load(path, weights_only=True)


def train_denoiser(
    settings: Settings,
    sizes: dict[str, Any],
    latents: torch.Tensor,
    captions: list[list[str]],
    work: Path,
    update: Callable[["UNet2DConditionModel", "CLIPTextModel", State], None],
) -> None:
    """Train the UNet and the text encoder together with the error in eps (Eq. 1 of latent diffusion).

    Args:
        settings: what the weights depend on.
        sizes: sizes of the UNet and the text encoder.
        latents: latents of all rows, [rows, c, h, w].
        captions: two captions per row.
        work: folder of the checkpoints.
        update: called with the averaged models and the state every CHECK_EVERY steps and at the end.
    """
    from diffusers.models.attention_processor import AttnProcessor

    torch.manual_seed(settings.seed + 1)
    tokenizer = sd_tiny.make_tokenizer()
    flat = sd_tiny.tokenize(tokenizer, [text for pair in captions for text in pair] + ["", ""])
    ids = flat.view(len(captions) + 1, 2, -1)
    text_encoder = sd_tiny.make_text_encoder(sizes["text"], len(tokenizer))
    unet = sd_tiny.make_unet(sizes["unet"], latents.shape[1], sizes["text"]["hidden_size"])
    use_channels_last(unet)
    unet.set_attn_processor(AttnProcessor())  # fused attention has a slow bfloat16 backward pass on the CPU
    both = torch.nn.ModuleDict({"unet": unet, "text_encoder": text_encoder})
    abar = sd_tiny.make_scheduler().alphas_cumprod

    def loss_at(step: int) -> torch.Tensor:
        z, words, t, noise = draws_of(settings, step, ids, latents)
        a = abar[t].view(-1, 1, 1, 1)
        noised = (a.sqrt() * z + (1 - a).sqrt() * noise).contiguous(memory_format=torch.channels_last)
        with torch.autocast("cpu", torch.bfloat16):
            predicted = unet(noised, t, text_encoder(words)[0]).sample
        weight = a ** range_at(step)[2]
        return (weight * (predicted.float() - noise).square()).mean()

    def after(step: int, state: State) -> None:
        if step % CHECK_EVERY == 0 or step == settings.steps:
            unet_ema, text_encoder_ema = copy.deepcopy((unet, text_encoder))
            averaged = torch.nn.ModuleDict({"unet": unet_ema, "text_encoder": text_encoder_ema})
            averaged.load_state_dict(state["ema"])
            averaged.eval().requires_grad_(False)
            update(unet_ema, text_encoder_ema, state)

    stage = Stage(
        title="denoiser",
        steps=settings.steps,
        peak=settings.lr,
        warmup=settings.warmup,
        decay_from=settings.decay_from,
        ema=settings.ema,
        checkpoint=work / "denoiser.pt",
    )
    train_loop(both, loss_at, stage, after)


def train(
    out: Path,
    settings: Settings,
    sizes: dict[str, dict[str, Any]] = sd_tiny.SIZES,
    *,
    check_num: int = 100,
    draws: int = 8,
) -> dict[str, Any]:
    """Train the remaining steps and write `out`. Checkpoints are in `out`.work until training is finished.

    Args:
        out: folder of the teacher.
        settings: what the weights depend on.
        sizes: sizes of the three models.
        check_num: number of pairs in each evaluation of the binding.
        draws: number of (t, eps) per pair in each evaluation.

    Returns:
        The content of the folder's training.json.
    """
    work = out.with_name(out.name + ".work")
    work.mkdir(parents=True, exist_ok=True)
    same_settings(work / "settings.json", {**asdict(settings), "sizes": sizes})
    pictures, captions = scene_pictures(settings, work)
    say(f"{len(captions)} scenes, {len(pictures)} drawn")
    vae, vae_about = train_vae(settings, sizes["vae"], pictures, work)
    latents = cached_latents(vae, pictures, work)
    tokenizer = sd_tiny.make_tokenizer()
    checks: list[dict[str, Any]] = (
        json.loads((work / "checks.json").read_text()) if (work / "checks.json").exists() else []
    )
    about: dict[str, Any] = {}

    def update(unet: "UNet2DConditionModel", text_encoder: "CLIPTextModel", state: State) -> None:
        accuracies = check_binding(vae, unet, text_encoder, tokenizer, num=check_num, draws=draws)
        say(f"step {state['step']}: {accuracies}")
        checks[:] = [row for row in checks if row["step"] < state["step"]] + [
            {"step": state["step"], **accuracies}
        ]
        (work / "checks.json").write_text(json.dumps(checks))
        about.update(
            settings=asdict(settings),
            sizes=sizes,
            steps=state["step"],
            samples=state["step"] * settings.batch,
            ranges=RANGES,
            vae=vae_about,
            seconds=round(state["seconds"]),
            losses=state["losses"],
            check=accuracies,
            checks=checks[:],
            torch=torch.__version__,
        )
        sd_tiny.save_folder(
            out, vae=vae, unet=unet, text_encoder=text_encoder, tokenizer=tokenizer, about=about
        )

    train_denoiser(settings, sizes, latents, captions, work, update)
    shutil.rmtree(work)
    return about


def same_settings(path: Path, settings: dict[str, Any]) -> None:
    """Check the settings against those of the checkpoints, then write them. `steps` may change.

    Raises:
        UserError: if another setting differs.
    """
    now = json.loads(json.dumps(settings))
    if path.exists():
        before = json.loads(path.read_text())
        changed = [name for name in now if name != "steps" and before.get(name) != now[name]]
        if changed:
            raise UserError(
                f"{path.parent} was started with another {', '.join(changed)}; remove it or use another --out"
            )
    path.write_text(json.dumps(now, indent=2))


# --- the command line ---------------------------------------------------------------------------------


def inspect(out: Path, *, check: bool, samples: Path | None) -> None:
    """Check the binding of a finished folder on disk and write samples of it."""
    pipeline = sd_tiny.load_folder(out)
    if check:
        accuracies = check_binding(pipeline.vae, pipeline.unet, pipeline.text_encoder, pipeline.tokenizer)
        about = json.loads((out / "training.json").read_text())
        (out / "training.json").write_text(json.dumps(about | {"check": accuracies}, indent=2) + "\n")
        print(json.dumps(accuracies))
    if samples is not None:
        samples.parent.mkdir(parents=True, exist_ok=True)
        sd_tiny.sample_grid(pipeline).save(samples)


def main() -> int:
    """Run the command line and return the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    defaults = Settings()
    parser.add_argument("--out", type=Path, required=True, help="folder of the teacher")
    for name in ("steps", "scenes", "vae_steps", "seed"):
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=getattr(defaults, name))
    parser.add_argument(
        "--check", action="store_true", help="measure how often the true caption of an existing --out wins"
    )
    parser.add_argument("--samples", type=Path, help="PNG file for samples of an existing --out")
    options = parser.parse_args()
    torch.set_num_threads(1)
    try:
        if options.check or options.samples:
            if not (options.out / "model_index.json").exists():
                raise UserError(
                    f"{options.out}: no such teacher; train it first, without --check and --samples"
                )
            inspect(options.out, check=options.check, samples=options.samples)
            return 0
        values = {name: getattr(options, name) for name in ("steps", "scenes", "vae_steps", "seed")}
        if min(values.values()) < 1 or values["seed"] < 1000:
            raise UserError("give 1 or more of each, and --seed 1000 or more: the test sets use lower seeds")
        train(options.out, Settings(**values))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
