"""Seconds per step of one student: alone, distilled from a cache, with a live teacher, and in bare torch."""

import argparse
import copy
import dataclasses
import time
from collections.abc import Callable

import torch
from bench_report import HEAD, alternate, compare

from student.engine import clamp_scales, parameter_groups, quiet_deepspeed, start_engine
from student.models.two_tower import TINY
from student.recipe import Now, Run
from student.recipes import find
from student.train import prepare


def bench_train(options: argparse.Namespace) -> list[str]:
    """The table of step times."""
    TINY["bench"] = copy.deepcopy(TINY["vit-tiny"])
    TINY["bench"]["vision_cfg"] |= {"width": 384, "layers": 6}
    now, batch_size = Now(0, 100), 64

    def ready(name: str, *, live: bool = False):
        recipe = find(name)
        recipe = dataclasses.replace(recipe, batch=batch_size, steps=4,
                                     constants=dataclasses.replace(recipe.constants, model="bench"))  # fmt: skip
        run = Run(data=options.data, cache="caches/demo", out="unused", device="cpu", live=live)
        prepared = prepare(recipe, run)
        return recipe, run, prepared.step, prepared.batches[0]

    def engine_step(name: str, *, live: bool = False) -> Callable[[], float]:
        recipe, run, step, batch = ready(name, live=live)
        engine = start_engine(step, recipe.optim, run, batch_size)

        def once() -> float:
            begin = time.perf_counter()
            with quiet_deepspeed():
                loss, _, _ = engine(batch, now)
                engine.backward(loss)
                engine.step()
                clamp_scales(engine)
            return time.perf_counter() - begin

        return once

    def bare_step(name: str) -> Callable[[], float]:
        recipe, _, step, batch = ready(name)
        optimizer = torch.optim.AdamW(parameter_groups(step, recipe.optim.weight_decay), lr=recipe.optim.lr, fused=True)

        def once() -> float:
            begin = time.perf_counter()
            loss, _, _ = step(batch, now)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            return time.perf_counter() - begin

        return once

    figures = alternate(options.rounds, clip=engine_step("clip"), clip_kd=engine_step("clip_kd"),
                        bare=bare_step("clip"), live=engine_step("clip_kd", live=True))  # fmt: skip
    lines = [
        compare("clip_kd on a cache", figures, "clip_kd", "clip", unit="s", other="clip alone", bar="<= 1.05"),
        compare("clip_kd with clip-lite live", figures, "live", "clip", unit="s", other="clip alone"),
        compare("DeepSpeed engine, clip", figures, "clip", "bare", unit="s", other="bare torch loop", bar="<= 1.05"),
    ]
    size = sum(parameter.numel() for parameter in ready("clip")[2].parameters()) / 1e6
    return [f"A student of {size:.1f}M parameters, batch {batch_size}: seconds per step.", "", *HEAD, *map(str, lines)]
