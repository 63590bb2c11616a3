"""Trains the tiny diffusion teacher `sd-tiny` on drawn scenes: an autoencoder, then a UNet with its text encoder.

Not for quality: it is to be a latent diffusion model of the real kind, whose denoising error knows which colour
belongs to which object, in an hour or two on one CPU core. Killed, the same command goes on.

    python -m scripts.teachers.train_sd_tiny --out models/sd_tiny
    python -m scripts.teachers.train_sd_tiny --out models/sd_tiny --check --samples docs/sd_tiny_samples.png   # of what is there
"""

import argparse
import copy
import json
import math
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from scripts.teachers import sd_tiny
from teachercache.core.errors import UserError
from teachercache.core.paths import stream_whole
from teachercache.core.progress import say, ticker

CHECK_EVERY = 500  # steps; the binding is measured and the folder renewed
SAVE_EVERY = 250  # steps
# From step; t in [low, high) for most draws; the power of abar that errors are weighed with. Colours and shapes are
# learnt first, from t where they are in doubt; where things lie is in doubt only where almost all is noise.
RANGES = ((0, 250, 850, 0.0), (1750, 450, 950, -0.5), (2750, 750, 1000, -0.5))
WHITENED = 500  # pictures that say how large a latent channel is


@dataclass(frozen=True)
class Settings:
    """What the weights depend on."""

    scenes: int = 16_000
    steps: int = 4000
    vae_steps: int = 1000
    seed: int = 1000  # 0 to 3 are the seeds of the demo, the test, the validation sets and the vanilla CLIP
    batch: int = 32
    vae_batch: int = 8
    lr: float = 1e-3
    vae_lr: float = 2e-3
    warmup: int = 100
    decay_from: float = (
        0.8  # part of the steps at a constant rate; then a cosine to 0, so that --steps can be raised
    )
    ema: float = 0.998
    vae_ema: float = 0.99
    kl: float = 1e-5  # of the KL per latent element, beside the squared error per value
    first_caption: float = 0.85  # how often the caption that names everything is read, else the other
    dropout: float = 0.1  # of whole captions to "", for guidance and for d(x, "")
    ranged: float = 0.6  # part of the draws with t in the range of RANGES; the rest over all t


# --- the data ---------------------------------------------------------------------------------------


def scene_pictures(settings: Settings, work: Path) -> tuple[torch.Tensor, list[list[str]]]:
    """Pictures uint8 [n, 3, 64, 64] and their captions; only the first pictures where the latents are kept already."""
    held_out = sd_tiny.held_out_keys()
    chosen = sd_tiny.choose_scenes(settings.scenes, seed=settings.seed, held_out=held_out)
    drawn = chosen[:WHITENED] if (work / "latents.pt").exists() else chosen
    return sd_tiny.draw([scene for _, scene in drawn]), [captions for captions, _ in chosen]


def latents_of(vae: Any, pictures: torch.Tensor) -> torch.Tensor:
    """The latents [n, c, 8, 8] of all pictures, with progress."""
    parts = []
    with ticker(len(pictures), "pictures", "encoding") as tick:
        for part in pictures.split(100):
            parts.append(sd_tiny.encode(vae, part))
            tick.step(len(part))
    return torch.cat(parts)


def range_at(step: int) -> tuple[int, int, float]:
    """The row of RANGES that holds at a step, without its step."""
    return next(row[1:] for row in reversed(RANGES) if step >= row[0])


def draws_of(
    settings: Settings, step: int, ids: torch.Tensor, latents: torch.Tensor
) -> tuple[torch.Tensor, ...]:
    """A step's (latents, ids, t, noise), from the seed and the step alone. ids [n + 1, 2, L], the last row is ""."""
    pen = torch.Generator().manual_seed(settings.seed * 1_000_003 + step)
    n = settings.batch
    rows = torch.randint(len(latents), (n,), generator=pen)
    which = (torch.rand(n, generator=pen) >= settings.first_caption).long()
    empty = torch.rand(n, generator=pen) < settings.dropout
    low, high, _ = range_at(step)
    t = torch.where(
        torch.rand(n, generator=pen) < settings.ranged,
        torch.randint(low, high, (n,), generator=pen),
        torch.randint(0, 1000, (n,), generator=pen),
    )
    noise = torch.randn(n, *latents.shape[1:], generator=pen)
    return latents[rows].float(), ids[torch.where(empty, len(ids) - 1, rows), which], t, noise


# --- one loop for both parts --------------------------------------------------------------------------


def rate_at(step: int, settings: Settings, steps: int, peak: float) -> float:
    """Learning rate: linear warm-up, constant, cosine to 0 over the last part."""
    start = settings.decay_from * steps
    left = 1.0 if step < start else 0.5 + 0.5 * math.cos(math.pi * (step - start) / (steps - start))
    return peak * min(1.0, (step + 1) / settings.warmup) * left


def train_loop(
    part: torch.nn.Module,
    loss_at: Callable[[int], torch.Tensor],
    settings: Settings,
    *,
    steps: int,
    peak: float,
    decay: float,
    checkpoint: Path,
    title: str,
    after: Callable[[int, dict], None] = lambda step, state: None,
) -> dict[str, Any]:
    """Steps of AdamW, averaging the weights; goes on from `checkpoint`. Returns {step, ema, seconds, losses}."""
    optimizer = torch.optim.AdamW(
        part.parameters(), lr=peak, betas=(0.9, 0.99), weight_decay=0.01, fused=True
    )
    ema = {name: value.detach().clone() for name, value in part.state_dict().items()}
    state: dict[str, Any] = {"step": 0, "seconds": 0.0, "losses": []}
    if checkpoint.exists():
        saved = torch.load(checkpoint, weights_only=True)
        part.load_state_dict(saved.pop("part"))
        optimizer.load_state_dict(saved.pop("optimizer"))
        ema = saved.pop("ema")
        state = saved
        say(f"{title}: going on at step {state['step']}")
    state["ema"] = ema
    began, before, recent = time.monotonic(), state["seconds"], []
    with ticker(steps - state["step"], "steps", title) as tick:
        for step in range(state["step"], steps):
            for group in optimizer.param_groups:
                group["lr"] = rate_at(step, settings, steps, peak)
            loss = loss_at(step)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(part.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            average(ema, part, min(decay, (1 + step) / (10 + step)))
            recent = [*recent[-99:], loss.item()]
            state["step"], state["seconds"] = step + 1, before + time.monotonic() - began
            tick.step(1, f"loss {sum(recent) / len(recent):.4f}")
            if (step + 1) % SAVE_EVERY == 0 or step + 1 == steps:
                state["losses"].append([step + 1, round(sum(recent) / len(recent), 5)])
                after(step + 1, state)
                whole = {**state, "part": part.state_dict(), "optimizer": optimizer.state_dict()}
                stream_whole(checkpoint, lambda file, whole=whole: torch.save(whole, file))
    return state


@torch.no_grad()
def average(ema: dict[str, torch.Tensor], part: torch.nn.Module, decay: float) -> None:
    """Moves the average towards the weights."""
    now = part.state_dict()
    floats = [name for name, value in now.items() if value.is_floating_point()]
    torch._foreach_lerp_([ema[name] for name in floats], [now[name] for name in floats], 1 - decay)


def train_vae(settings: Settings, sizes: dict, pictures: torch.Tensor, work: Path) -> tuple[Any, dict]:
    """The autoencoder: squared and absolute error and a small KL; then whitened per channel."""
    torch.manual_seed(settings.seed)
    vae = sd_tiny.make_vae(sizes).to(memory_format=torch.channels_last)

    def loss_at(step: int) -> torch.Tensor:
        pen = torch.Generator().manual_seed(settings.seed * 1_000_003 + step)
        rows = torch.randint(len(pictures), (settings.vae_batch,), generator=pen)
        x = sd_tiny.as_input(pictures[rows]).contiguous(memory_format=torch.channels_last)
        with torch.autocast("cpu", torch.bfloat16):
            posterior = vae.encode(x).latent_dist
            z = posterior.sample(generator=pen)
            error = vae.decode(z).sample.float() - x
        kl = posterior.kl().float().mean() / z[0].numel()
        return error.square().mean() + 0.1 * error.abs().mean() + settings.kl * kl

    state = train_loop(
        vae,
        loss_at,
        settings,
        steps=settings.vae_steps,
        peak=settings.vae_lr,
        decay=settings.vae_ema,
        checkpoint=work / "vae.pt",
        title="autoencoder",
    )
    vae.load_state_dict(state["ema"])
    vae.eval().requires_grad_(False)
    sd_tiny.whiten(vae, pictures[:WHITENED])
    with torch.no_grad():
        some = pictures[:200]
        error = vae.decode(sd_tiny.encode(vae, some)).sample.clamp(-1, 1) - sd_tiny.as_input(some)
    psnr = 10 * math.log10(4 / error.square().mean().item())
    say(f"autoencoder: PSNR {psnr:.1f} dB after {settings.vae_steps} steps")
    return vae, {"psnr_db": round(psnr, 2), "seconds": round(state["seconds"]), "losses": state["losses"]}


def cached_latents(vae: Any, pictures: torch.Tensor, work: Path) -> torch.Tensor:
    """As `latents_of`, kept in float16 beside the checkpoints."""
    path = work / "latents.pt"
    if not path.exists():
        latents = latents_of(vae, pictures).half()
        stream_whole(path, lambda file: torch.save(latents, file))
    return torch.load(path, weights_only=True)


def train_denoiser(
    settings: Settings,
    sizes: dict,
    latents: torch.Tensor,
    captions: list[list[str]],
    work: Path,
    renew: Callable[[Any, Any, dict], None],
) -> tuple[Any, Any, dict]:
    """The UNet and the text encoder together: Eq. 1 of latent diffusion, the error in eps."""
    from diffusers.models.attention_processor import AttnProcessor

    torch.manual_seed(settings.seed + 1)
    tokenizer = sd_tiny.make_tokenizer()
    flat = sd_tiny.tokenize(tokenizer, [text for pair in captions for text in pair] + ["", ""])
    ids = flat.view(len(captions) + 1, 2, -1)
    text_encoder = sd_tiny.make_text_encoder(sizes["text"], len(tokenizer))
    unet = sd_tiny.make_unet(sizes["unet"], latents.shape[1], sizes["text"]["hidden_size"])
    unet = unet.to(memory_format=torch.channels_last)
    unet.set_attn_processor(AttnProcessor())  # the CPU's fused attention is slow backwards in bfloat16
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

    def after(step: int, state: dict) -> None:
        if step % CHECK_EVERY == 0 or step == settings.steps:
            averaged = copy.deepcopy(both)
            averaged.load_state_dict(state["ema"])
            averaged.eval().requires_grad_(False)
            renew(averaged["unet"], averaged["text_encoder"], state)

    state = train_loop(
        both,
        loss_at,
        settings,
        steps=settings.steps,
        peak=settings.lr,
        decay=settings.ema,
        checkpoint=work / "denoiser.pt",
        title="denoiser",
        after=after,
    )
    both.load_state_dict(state["ema"])
    both.eval().requires_grad_(False)
    return unet, text_encoder, state


def train(
    out: Path, settings: Settings, sizes: dict = sd_tiny.SIZES, *, check_num: int = 100, draws: int = 8
) -> dict:
    """Trains what is left to train and writes `out`; checkpoints lie in `out`.work until all is done."""
    work = out.with_name(out.name + ".work")
    work.mkdir(parents=True, exist_ok=True)
    same_settings(work / "settings.json", {**asdict(settings), "sizes": sizes})
    pictures, captions = scene_pictures(settings, work)
    say(f"{len(captions)} scenes, {len(pictures)} drawn")
    vae, vae_about = train_vae(settings, sizes["vae"], pictures, work)
    latents = cached_latents(vae, pictures, work)
    tokenizer = sd_tiny.make_tokenizer()
    checks: list[dict] = (
        json.loads((work / "checks.json").read_text()) if (work / "checks.json").exists() else []
    )
    about: dict[str, Any] = {}

    def renew(unet: Any, text_encoder: Any, state: dict) -> None:
        found = sd_tiny.check(vae, unet, text_encoder, tokenizer, num=check_num, draws=draws)
        say(f"step {state['step']}: {found}")
        checks[:] = [row for row in checks if row["step"] < state["step"]] + [
            {"step": state["step"], **found}
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
            check=found,
            checks=checks[:],
            torch=torch.__version__,
        )
        sd_tiny.save_folder(
            out, vae=vae, unet=unet, text_encoder=text_encoder, tokenizer=tokenizer, about=about
        )

    train_denoiser(settings, sizes, latents, captions, work, renew)
    shutil.rmtree(work)
    return about


def same_settings(path: Path, settings: dict) -> None:
    """Refuses to go on with other settings than the checkpoints'; more steps of the denoiser may be asked for."""
    now = json.loads(json.dumps(settings))
    if path.exists():
        before = json.loads(path.read_text())
        changed = [name for name in now if name != "steps" and before.get(name) != now[name]]
        if changed:
            raise UserError(
                f"{path.parent} was begun with another {', '.join(changed)}; remove it or use another --out"
            )
    path.write_text(json.dumps(now, indent=2))


# --- the command line ---------------------------------------------------------------------------------


def inspect(out: Path, *, check: bool, samples: Path | None) -> None:
    """Checks a finished folder, as it lies on disk, and writes its samples."""
    pipeline = sd_tiny.load_folder(out)
    if check:
        parts = (pipeline.vae, pipeline.unet, pipeline.text_encoder, pipeline.tokenizer)
        found = sd_tiny.check(*parts)
        about = json.loads((out / "training.json").read_text())
        (out / "training.json").write_text(json.dumps(about | {"check": found}, indent=2) + "\n")
        print(json.dumps(found))
    if samples is not None:
        samples.parent.mkdir(parents=True, exist_ok=True)
        sd_tiny.sample_grid(pipeline).save(samples)


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    defaults = Settings()
    parser.add_argument("--out", type=Path, required=True, help="folder to make, or made already")
    for name in ("steps", "scenes", "vae_steps", "seed"):
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=getattr(defaults, name))
    parser.add_argument("--check", action="store_true", help="of --out as it is: does the true caption win?")
    parser.add_argument("--samples", type=Path, help="of --out as it is: a PNG of samples to write")
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
        given = {name: getattr(options, name) for name in ("steps", "scenes", "vae_steps", "seed")}
        if min(given.values()) < 1 or given["seed"] < 1000:
            raise UserError("give 1 or more of each, and --seed 1000 or more: lower seeds are the test sets'")
        train(options.out, Settings(**given))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
