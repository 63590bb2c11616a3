"""Benchmark a training step: without a teacher, with a cache, with a live teacher, and in a plain loop of torch.

python -m scripts.benchmarks.train RECIPE DATA    peak memory of some steps of a recipe; prints a JSON line
"""

import argparse
import copy
import dataclasses
import importlib
import json
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from scripts.benchmarks.report import HEAD, alternate, compare, resident
from student.models.two_tower.loading import TINY
from student.recipe import Progress, Recipe, Run
from student.recipes.registry import find
from student.training.engine import clamp_scales, parameter_groups, quiet_deepspeed, start_engine
from student.training.prepare import prepare
from student.training.step import TrainStep
from teachercache.core.process import keep_memory
from teachercache.core.progress import say

BATCH, NOW = 64, Progress(0, 100)
CACHE = "caches/demo/clip-lite.zarr"  # explicit, because other caches of the data may exist


class Setup(NamedTuple):
    """Everything that a step needs."""

    recipe: Recipe
    run: Run
    step: TrainStep
    batch: dict[str, torch.Tensor]


def set_up(name: str, data: str, *, live: bool = False) -> Setup:
    """Prepare a step of a student with more than 20M parameters, and its first batch."""
    TINY["bench"] = copy.deepcopy(TINY["vit-tiny"])
    TINY["bench"]["vision_cfg"] |= {"width": 384, "layers": 6}
    recipe = find(name)
    recipe = dataclasses.replace(
        recipe, batch=BATCH, steps=4, constants=dataclasses.replace(recipe.constants, model="bench")
    )
    device = "cuda" if torch.cuda.is_available() else "cpu"
    run = Run(data=data, cache=CACHE, out="unused", device=device, online_teacher=live)
    prepared = prepare(recipe, run)
    batch = {key: value.to(device) for key, value in prepared.batches[0].items()}
    return Setup(recipe, run, prepared.step.to(device), batch)


def engine_step(name: str, data: str, *, live: bool = False) -> Callable[[], float]:
    """Return a function that takes a step with DeepSpeed's engine, as `student train` does, and returns the seconds."""
    setup = set_up(name, data, live=live)
    engine = start_engine(setup.step, setup.recipe.optim, setup.run, BATCH)

    def once() -> float:
        begin = time.perf_counter()
        with quiet_deepspeed():
            loss, _, _ = engine(setup.batch, NOW)
            engine.backward(loss)
            engine.step()
            clamp_scales(engine)
        loss.item()  # waits for an accelerator
        return time.perf_counter() - begin

    return once


def bare_step(name: str, data: str) -> Callable[[], float]:
    """Return a function that takes the same step in plain torch and returns the seconds."""
    setup = set_up(name, data)
    groups = parameter_groups(setup.step, setup.recipe.optim.weight_decay)
    optimizer = torch.optim.AdamW(groups, lr=setup.recipe.optim.lr, fused=True)

    def once() -> float:
        begin = time.perf_counter()
        loss, _, _ = setup.step(setup.batch, NOW)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        loss.item()
        return time.perf_counter() - begin

    return once


def memory(name: str, data: str) -> int:
    """Return the peak memory of some steps in bytes, without the memory in use before student and engine exist."""
    keep_memory()
    with quiet_deepspeed():
        importlib.import_module("deepspeed")  # load libraries before the baseline
    if torch.cuda.is_available():
        engine_step("clip", data)
        before = torch.cuda.memory_allocated()
    else:
        before = resident("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # reset the peak
    once = engine_step(name, data)
    for _ in range(4):
        once()
    return (torch.cuda.max_memory_allocated() if torch.cuda.is_available() else resident("VmHWM")) - before


def memory_in_process(name: str, data: str) -> float:
    """Return `memory` in megabytes, measured in a new process."""
    say(f"memory of {name}")
    process = subprocess.run(
        [sys.executable, "-m", "scripts.benchmarks.train", name, data],
        capture_output=True,
        text=True,
        check=True,
    )
    return json.loads(process.stdout.splitlines()[-1]) / 1e6


def bench_train(options: argparse.Namespace) -> list[str]:
    """Return the table of step times and memory."""
    data = options.data
    peaks = alternate(
        max(1, options.rounds // 3),
        {name: partial(memory_in_process, name, data) for name in ("clip", "clip_kd")},
        uncounted=0,
    )
    times = alternate(
        options.rounds,
        {
            "clip": engine_step("clip", data),
            "clip_kd": engine_step("clip_kd", data),
            "psd": engine_step("psd", data),
            "bare": bare_step("clip", data),
            "live": engine_step("clip_kd", data, live=True),
        },
    )
    alone: dict[str, Any] = {"unit": "s", "other": "clip alone"}
    lines = [
        compare("clip_kd on a cache", times, "clip_kd", "clip", bar="<= 1.05", **alone),
        compare(
            "clip_kd on a cache, peak memory", peaks, "clip_kd", "clip", bar="<= 1.1", unit="MB", other="clip"
        ),
        compare("psd", times, "psd", "clip", bar="<= 1.02", **alone),
        compare("clip_kd with clip-lite live", times, "live", "clip", **alone),
        compare(
            "DeepSpeed engine, clip", times, "clip", "bare", unit="s", other="bare torch loop", bar="<= 1.05"
        ),
    ]
    size = sum(parameter.numel() for parameter in set_up("clip", data).step.parameters()) / 1e6
    note = (
        f"A student of {size:.1f}M parameters, batch {BATCH}: seconds per step. Memory: the peak of parameters, moments, "
        "gradients and activations over some steps, each measured in a new process."
    )
    return [note, "", *HEAD, *map(str, lines)]


if __name__ == "__main__":
    print(json.dumps(memory(sys.argv[1], sys.argv[2])))
