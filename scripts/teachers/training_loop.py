"""Train a module with AdamW, an average of its weights and checkpoints, for the small teachers."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from teachercache.core.paths import stream_whole
from teachercache.core.progress import say, ticker

SAVE_EVERY = 250  # steps

State = dict[str, Any]  # step, ema, seconds, losses


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One training: its length, its learning-rate schedule and its checkpoint."""

    title: str
    steps: int
    peak: float  # learning rate
    warmup: int  # steps
    decay_from: float  # fraction of the steps before the cosine decay
    ema: float  # decay of the weight average
    checkpoint: Path


def rate_at(step: int, stage: Stage) -> float:
    """Return the learning rate: linear warmup, constant, then cosine decay to 0."""
    start = stage.decay_from * stage.steps
    left = 1.0 if step < start else 0.5 + 0.5 * math.cos(math.pi * (step - start) / (stage.steps - start))
    return stage.peak * min(1.0, (step + 1) / stage.warmup) * left


def train_loop(
    module: torch.nn.Module,
    loss_at: Callable[[int], torch.Tensor],
    stage: Stage,
    after: Callable[[int, State], None] | None = None,
) -> State:
    """Train with AdamW, average the weights, and resume from the checkpoint of the stage.

    Args:
        module: module to train in place.
        loss_at: returns the loss of a step.
        stage: number of steps, learning-rate schedule, decay of the average, checkpoint.
        after: called with the step and the state before each checkpoint is written.

    Returns:
        The final state with the keys step, ema, seconds and losses.
    """
    optimizer = torch.optim.AdamW(
        module.parameters(), lr=stage.peak, betas=(0.9, 0.99), weight_decay=0.01, fused=True
    )
    ema = {name: value.detach().clone() for name, value in module.state_dict().items()}
    state: State = {"step": 0, "seconds": 0.0, "losses": []}
    if stage.checkpoint.exists():
        saved = torch.load(stage.checkpoint, weights_only=True)
        module.load_state_dict(saved.pop("part"))
        optimizer.load_state_dict(saved.pop("optimizer"))
        ema = saved.pop("ema")
        state = saved
        say(f"{stage.title}: resuming at step {state['step']}")
    state["ema"] = ema
    began, before = time.monotonic(), state["seconds"]
    recent: list[float] = []
    with ticker(stage.steps - state["step"], "steps", stage.title) as tick:
        for step in range(state["step"], stage.steps):
            for group in optimizer.param_groups:
                group["lr"] = rate_at(step, stage)
            loss = loss_at(step)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(module.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            average(ema, module, min(stage.ema, (1 + step) / (10 + step)))
            recent = [*recent[-99:], loss.item()]
            state["step"], state["seconds"] = step + 1, before + time.monotonic() - began
            tick.step(1, f"loss {sum(recent) / len(recent):.4f}")
            if (step + 1) % SAVE_EVERY == 0 or step + 1 == stage.steps:
                state["losses"].append([step + 1, round(sum(recent) / len(recent), 5)])
                if after is not None:
                    after(step + 1, state)
                checkpoint = {**state, "part": module.state_dict(), "optimizer": optimizer.state_dict()}
                stream_whole(stage.checkpoint, partial(torch.save, checkpoint))
    return state


@torch.no_grad()
def average(ema: dict[str, torch.Tensor], module: torch.nn.Module, decay: float) -> None:
    """Update the exponential moving average of the weights in place."""
    now = module.state_dict()
    floats = [name for name, value in now.items() if value.is_floating_point()]
    torch._foreach_lerp_([ema[name] for name in floats], [now[name] for name in floats], 1 - decay)
