"""Compute the exact gradient of a batch that does not fit into memory, by micro-batches (GradCache).

A contrastive loss compares all rows, so the sum of the gradients of micro-batch losses is wrong. GradCache
(Gao et al., 2021) makes three passes: compute the outputs of all micro-batches without a graph; compute the
loss of the whole batch and its gradient with respect to the outputs; run each micro-batch again with the same
random numbers and backpropagate its output gradients. It needs the memory of one micro-batch and of all
outputs, and the time of one more forward pass.
"""

import torch
from torch import Tensor

from student.recipe import Progress
from student.training.engine import random_state, set_random_state, take_optimizer_step
from student.training.step import Engine, Loss

Batch = dict[str, Tensor]


def accumulate(engine: Engine, micro_batches: list[Batch], progress: Progress, device: str) -> Loss:
    """Take one optimizer step over the micro-batches of a batch, and return the loss of the whole batch.

    Args:
        engine: The engine of the run.
        micro_batches: Micro-batches in main memory; each is moved to the device when it is used.
        progress: Current step and number of steps.
        device: Device of the engine.
    """
    states, outputs, fields = [], [], []
    with torch.no_grad():
        for micro_batch in micro_batches:
            states.append(random_state())
            micro_outputs, micro_fields = engine(on_device(micro_batch, device), progress, {})
            outputs.append(micro_outputs)
            fields.append(micro_fields)
    rows = [num_rows(micro_batch) for micro_batch in micro_batches]
    leaves = {name: value.detach().requires_grad_() for name, value in joined(outputs, rows).items()}
    loss = engine.module.loss(leaves, joined(fields, rows), progress)
    loss.total.backward()
    gradients = split({name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}, rows)
    final_state = random_state()
    for micro_batch, state, gradient in zip(micro_batches, states, gradients, strict=True):
        set_random_state(state)
        # DeepSpeed divides the loss by the number of micro-batches, and takes the step after the last one
        engine.backward(len(micro_batches) * engine(on_device(micro_batch, device), progress, gradient))
        take_optimizer_step(engine)
    set_random_state(final_state)
    terms = {name: term.detach() for name, term in loss.terms.items()}
    return Loss(loss.total.detach(), terms, loss.notes)


def on_device(batch: Batch, device: str) -> Batch:
    """Return a batch on the given device."""
    return {name: value.to(device, non_blocking=True) for name, value in batch.items()}


def num_rows(micro_batch: Batch) -> int:
    """Return the number of rows of a micro-batch; constants such as logit_scale have no rows."""
    return max(len(value) for value in micro_batch.values() if value.ndim)


def joined(micro_batches: list[Batch], rows: list[int]) -> Batch:
    """Concatenate the rows of micro-batches. Entries without rows (a scale) are equal and taken once."""
    return {
        name: torch.cat([micro_batch[name] for micro_batch in micro_batches])
        if per_row(value, rows[0])
        else value
        for name, value in micro_batches[0].items()
    }


def split(whole: Batch, rows: list[int]) -> list[Batch]:
    """Undo `joined`. The gradient of an entry without rows is divided equally among the micro-batches."""
    micro_batches: list[Batch] = [{} for _ in rows]
    for name, value in whole.items():
        shares = (
            value.split(rows)
            if len(value.shape) and len(value) == sum(rows)
            else [value / len(rows)] * len(rows)
        )
        for micro_batch, share in zip(micro_batches, shares, strict=True):
            micro_batch[name] = share
    return micro_batches


def per_row(value: Tensor, rows: int) -> bool:
    """Return whether a tensor has one entry per row."""
    return value.ndim > 0 and len(value) == rows
