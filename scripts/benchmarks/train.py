"""A step of one student: alone, distilled from a cache, with a live teacher, and in bare torch. Time, and peak memory.

Called with a recipe and data it prints the memory of that recipe's steps in this process, a JSON line.
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
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from scripts.benchmarks.report import HEAD, alternate, compare, resident
from student.models.two_tower.loading import TINY
from student.recipe import Now, Run
from student.recipes.registry import find
from student.training.engine import clamp_scales, parameter_groups, quiet_deepspeed, start_engine
from student.training.loop import prepare
from teachercache.core.process import keep_memory
from teachercache.core.progress import say

BATCH, NOW = 64, Now(0, 100)
CACHE = "caches/demo/clip-lite.zarr"  # that one, not another that may lie beside it


def ready(name: str, data: str, *, live: bool = False) -> Any:
    """Recipe, run, step and first batch of a student of 20M parameters and more."""
    TINY["bench"] = copy.deepcopy(TINY["vit-tiny"])
    TINY["bench"]["vision_cfg"] |= {"width": 384, "layers": 6}
    recipe = find(name)
    recipe = dataclasses.replace(
        recipe, batch=BATCH, steps=4, constants=dataclasses.replace(recipe.constants, model="bench")
    )
    device = "cuda" if torch.cuda.is_available() else "cpu"
    run = Run(data=data, cache=CACHE, out="unused", device=device, live=live)
    prepared = prepare(recipe, run)
    batch = {key: value.to(device) for key, value in prepared.batches[0].items()}
    return SimpleNamespace(recipe=recipe, run=run, step=prepared.step.to(device), batch=batch)


def engine_step(name: str, data: str, *, live: bool = False) -> Callable[[], float]:
    """A step through DeepSpeed's engine, as `student train` takes it: seconds."""
    made = ready(name, data, live=live)
    engine = start_engine(made.step, made.recipe.optim, made.run, BATCH)

    def once() -> float:
        begin = time.perf_counter()
        with quiet_deepspeed():
            loss, _, _ = engine(made.batch, NOW)
            engine.backward(loss)
            engine.step()
            clamp_scales(engine)
        loss.item()  # waits for an accelerator
        return time.perf_counter() - begin

    return once


def bare_step(name: str, data: str) -> Callable[[], float]:
    """The same mathematics in a loop of torch alone."""
    made = ready(name, data)
    groups = parameter_groups(made.step, made.recipe.optim.weight_decay)
    optimizer = torch.optim.AdamW(groups, lr=made.recipe.optim.lr, fused=True)

    def once() -> float:
        begin = time.perf_counter()
        loss, _, _ = made.step(made.batch, NOW)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        loss.item()
        return time.perf_counter() - begin

    return once


def memory(name: str, data: str) -> int:
    """Bytes at the peak of some steps, beyond what was there before student and engine."""
    keep_memory()
    with quiet_deepspeed():
        importlib.import_module("deepspeed")  # libraries are loaded
    if torch.cuda.is_available():
        engine_step("clip", data)
        before = torch.cuda.memory_allocated()
    else:
        before = resident("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    once = engine_step(name, data)
    for _ in range(4):
        once()
    return (torch.cuda.max_memory_allocated() if torch.cuda.is_available() else resident("VmHWM")) - before


def memory_in_process(name: str, data: str) -> float:
    """Megabytes, from a fresh process."""
    say(f"memory of {name}")
    done = subprocess.run(
        [sys.executable, "-m", "scripts.benchmarks.train", name, data],
        capture_output=True,
        text=True,
        check=True,
    )
    return json.loads(done.stdout.splitlines()[-1]) / 1e6


def bench_train(options: argparse.Namespace) -> list[str]:
    """The table of step times."""
    data = options.data
    peaks = alternate(
        max(1, options.rounds // 3),
        uncounted=0,
        clip=lambda: memory_in_process("clip", data),
        clip_kd=lambda: memory_in_process("clip_kd", data),
    )
    times = alternate(
        options.rounds,
        clip=engine_step("clip", data),
        clip_kd=engine_step("clip_kd", data),
        psd=engine_step("psd", data),
        bare=bare_step("clip", data),
        live=engine_step("clip_kd", data, live=True),
    )
    alone = {"unit": "s", "other": "clip alone"}
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
    size = sum(parameter.numel() for parameter in ready("clip", data).step.parameters()) / 1e6
    note = (
        f"A student of {size:.1f}M parameters, batch {BATCH}: seconds per step; memory: parameters, moments, gradients "
        "and activations of some steps at the peak, each in a fresh process."
    )
    return [note, "", *HEAD, *map(str, lines)]


if __name__ == "__main__":
    print(json.dumps(memory(sys.argv[1], sys.argv[2])))
