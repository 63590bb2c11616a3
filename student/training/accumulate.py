"""One step over a batch that does not fit: the whole batch's exact gradient by micro-batches. Not for small batches.

A contrastive loss compares all rows, so adding up the gradients of micro-batch losses is wrong. Three passes instead
(GradCache, Gao et al., 2021): outputs of all micro-batches without a graph; the loss of the whole batch and its
gradient with respect to those outputs; each micro-batch once more, with the random numbers that it had, its outputs
multiplied by their gradients. Memory is that of one micro-batch and of the outputs; time is one more forward.
"""

from typing import Any

import torch
from torch import Tensor

from student.recipe import Progress
from student.training.engine import take_optimizer_step
from student.training.step import Loss

Batch = dict[str, Tensor]


def accumulate(engine: Any, parts: list[Batch], progress: Progress, device: str) -> Loss:
    """Return the loss of the whole batch after the engine has taken a step by its gradient.

    Micro-batches stay in main memory and are moved to the device when their turn comes.
    """
    states, outputs, fields = [], [], []
    with torch.no_grad():
        for part in parts:
            states.append(random_state())
            of_part = engine(on_device(part, device), progress, {})
            outputs.append(of_part[0])
            fields.append(of_part[1])
    rows = [num_rows(part) for part in parts]
    leaves = {name: value.detach().requires_grad_() for name, value in joined(outputs, rows).items()}
    loss = engine.module.loss(leaves, joined(fields, rows), progress)
    loss.total.backward()
    gradients = split({name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}, rows)
    after = random_state()
    for part, state, gradient in zip(parts, states, gradients, strict=True):
        set_random_state(state)
        # DeepSpeed divides by the number of parts, and takes the step after the last
        engine.backward(len(parts) * engine(on_device(part, device), progress, gradient))
        take_optimizer_step(engine)
    set_random_state(after)
    terms = {name: term.detach() for name, term in loss.terms.items()}
    return Loss(loss.total.detach(), terms, loss.notes)


def on_device(batch: Batch, device: str) -> Batch:
    """A batch where it is computed."""
    return {name: value.to(device, non_blocking=True) for name, value in batch.items()}


def num_rows(part: Batch) -> int:
    """Rows of a micro-batch: the length of whatever has one; constants such as logit_scale have none."""
    return max(len(value) for value in part.values() if value.ndim)


def joined(parts: list[Batch], rows: list[int]) -> Batch:
    """Rows of all parts; what is no row of theirs (a scale) is the same in each and taken once."""
    return {
        name: torch.cat([part[name] for part in parts]) if per_row(value, rows[0]) else value
        for name, value in parts[0].items()
    }


def split(whole: Batch, rows: list[int]) -> list[Batch]:
    """What `joined` joined; a share of a scale's gradient goes to each part."""
    parts: list[Batch] = [{} for _ in rows]
    for name, value in whole.items():
        shares = (
            value.split(rows)
            if len(value.shape) and len(value) == sum(rows)
            else [value / len(rows)] * len(rows)
        )
        for part, share in zip(parts, shares, strict=True):
            part[name] = share
    return parts


def per_row(value: Tensor, rows: int) -> bool:
    """Whether a tensor has one entry a row."""
    return value.ndim > 0 and len(value) == rows


def random_state() -> tuple[Tensor, Tensor | None]:
    """Random states of the CPU and of this process's GPU."""
    return torch.get_rng_state(), torch.cuda.get_rng_state() if torch.cuda.is_available() else None


def set_random_state(state: tuple[Tensor, Tensor | None]) -> None:
    """Go back to a `random_state`."""
    torch.set_rng_state(state[0])
    if state[1] is not None:
        torch.cuda.set_rng_state(state[1])
