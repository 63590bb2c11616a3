"""Benchmark a step of sds_clip against its bare UNet and student, and estimate the memory of Stable Diffusion v1."""

import argparse
import copy
import dataclasses
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch.nn.functional import mse_loss, normalize

from scripts.benchmarks.report import HEAD, Line, alternate, compare
from student.losses import clip_loss
from student.models.frozen_unet import num_weights, unet_bytes
from student.models.two_tower.loading import TINY
from student.recipe import Progress, Run, Setting
from student.recipes.sds_clip import SDS_CLIP
from student.training.engine import clamp_scales, parameter_groups, quiet_deepspeed, start_engine
from student.training.step import TrainStep
from teachercache.cache.disk_space import size
from teachercache.data.manifest import Manifest
from teachercache.teachers.diffusion.model import Diffusion

BATCH, LATENT, STATES, NOW = 32, (4, 16, 16), (24, 128), Progress(0, 100)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def make_diffusion() -> Diffusion:
    """Build a random UNet like that of Stable Diffusion, with a hundredth of its parameters."""
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel

    torch.manual_seed(1)
    unet = UNet2DConditionModel(
        sample_size=LATENT[1],
        block_out_channels=(64, 128),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=STATES[1],
        attention_head_dim=8,
    )
    alphas = (1 - torch.linspace(1e-4, 0.02, 1000)).cumprod(0)
    return Diffusion(unet, None, torch.nn.Identity(), alphas_cumprod=alphas, prediction="epsilon").to(DEVICE)


def make_step(module: Diffusion, **changes: Any) -> tuple[TrainStep, dict[str, torch.Tensor]]:
    """Build the step of `student train` and a random batch."""
    TINY["bench"] = copy.deepcopy(TINY["vit-tiny"])
    constants = dataclasses.replace(SDS_CLIP.constants, model="bench", **changes)
    recipe = dataclasses.replace(SDS_CLIP, constants=constants)
    torch.manual_seed(2)
    shapes = {"latent": LATENT}
    manifest = Manifest("", Path(), pa.table({}), "")
    student = recipe.student(constants, Setting(shapes, manifest, np.empty(0, int)))
    teacher: Any = SimpleNamespace(module=module) if recipe.fields else None
    heads = recipe.distill_heads(constants, student, shapes)
    step = TrainStep(recipe, student, heads, gradient_teacher=teacher)
    batch = {
        "image": torch.randn(BATCH, 3, 64, 64),
        "text": torch.randint(1, 5000, (BATCH, 16)),
        "text_states": torch.randn(BATCH, *STATES),
        "noise": torch.randn(BATCH, *LATENT),
        "t": torch.randint(0, 1000, (BATCH,)),
    }
    return step.to(DEVICE), {name: value.to(DEVICE) for name, value in batch.items()}


def engine_step(module: Diffusion, **constants: Any) -> Callable[[], float]:
    """Return a function that takes a step with DeepSpeed's engine and returns the seconds."""
    step, batch = make_step(module, **constants)
    engine = start_engine(step, SDS_CLIP.optim, Run(data="", cache="", out="", device=DEVICE), BATCH)
    checkpoint = bool(constants.get("checkpoint"))

    def once() -> float:
        if checkpoint:
            module.unet.enable_gradient_checkpointing()
        begin = time.perf_counter()
        with quiet_deepspeed():
            loss, _, _ = engine(batch, NOW)
            engine.backward(loss)
            engine.step()
            clamp_scales(engine)
        loss.item()  # waits for an accelerator
        seconds = time.perf_counter() - begin
        module.unet.disable_gradient_checkpointing()
        return seconds

    return once


def bare_step(module: Diffusion) -> Callable[[], float]:
    """Return a function that takes the same step in plain torch (student, h_w and UNet) and returns the seconds."""
    step, batch = make_step(module)
    heads = step.heads
    assert heads is not None
    optimizer = torch.optim.AdamW(parameter_groups(step, 0.0), lr=5e-5, fused=True)
    abar = module.alphas_cumprod[batch["t"]].view(-1, 1, 1, 1)

    def once() -> float:
        begin = time.perf_counter()
        outputs = step.student(batch)
        image, text = normalize(outputs["image"]), normalize(outputs["text"])
        noised = (
            abar.sqrt() * heads({"image": outputs["image"]})["latent"] + (1 - abar).sqrt() * batch["noise"]
        )
        predicted = module.unet(noised, batch["t"], encoder_hidden_states=batch["text_states"]).sample
        loss = clip_loss(image, text, outputs["scale"]) + 0.001 * mse_loss(predicted, batch["noise"])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        loss.item()
        return time.perf_counter() - begin

    return once


def memory_lines() -> list[Line]:
    """Return lines with the estimated memory of Stable Diffusion v1's UNet on latents of 64 x 64 x 4."""
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel

    with torch.device("meta"):
        unet = UNet2DConditionModel(sample_size=64, cross_attention_dim=768).eval().requires_grad_(False)
    lines = []
    for rows, checkpoint in ((1, False), (16, False), (32, False), (16, True), (32, True)):
        (unet.enable_gradient_checkpointing if checkpoint else unet.disable_gradient_checkpointing)()
        weights, kept = unet_bytes(unet, (4, 64, 64), (77, 768), rows=rows, dtype=torch.bfloat16)
        how = f"v1's UNet in bfloat16, {rows} rows at a time" + (", checkpoint=true" if checkpoint else "")
        lines.append(Line(how, size(weights + kept), "24 GB", f"{(weights + kept) / 24e9:.2f}"))
    return lines


def bench_sds(options: argparse.Namespace) -> list[str]:
    """Return the tables of step times and memory."""
    module = make_diffusion()
    times = alternate(
        options.rounds,
        {
            "bare": bare_step(module),
            "step": engine_step(module),
            "whole": engine_step(module, unet_rows=0),
            "few": engine_step(module, unet_rows=8),
            "checkpoint": engine_step(module, checkpoint=True),
            "sds": engine_step(module, grad="sds"),
            "none": engine_step(module, objective="none"),
        },
    )
    bare: dict[str, Any] = {"unit": "s", "other": "bare UNet forward and backward, and student"}
    lines = [
        compare("sds_clip as it is, 16 rows at a time", times, "step", "bare", bar="<= 1.05", **bare),
        compare("all rows at a time", times, "whole", "bare", bar="<= 1.05", **bare),
        compare("8 rows at a time", times, "few", "bare", **bare),
        compare("checkpoint=true", times, "checkpoint", "bare", **bare),
        compare("grad=sds", times, "sds", "bare", **bare),
        compare("L_CLIP alone", times, "none", "bare", **bare),
    ]
    sizes = (
        num_weights(module.unet) / 1e6,
        sum(map(torch.numel, make_step(module)[0].student.parameters())) / 1e6,
    )
    note = (
        f"A UNet of {sizes[0]:.1f}M parameters on latents of {LATENT}, a student of {sizes[1]:.1f}M, batch {BATCH}: "
        "seconds per step. Memory is an estimate of the weights and of all tensors at the peak of the UNet's forward and "
        "backward pass, without the student."
    )
    return [note, "", *HEAD, *map(str, lines), *map(str, memory_lines())]
