"""VILLA: adversarial perturbation of word and region embeddings (Gan et al., 2020). Not for UNITER or VL-BERT.

delta starts at 0 and takes K steps up the task loss, delta <- P(delta + lr g / |g|), each row's gradient by its own
norm; the loss at every delta on the way is trained on, and so is the divergence from the clean prediction.
VILLA perturbs one modality at a time; here words and regions take turns from step to step (free choice).
"""

import dataclasses
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from student.losses import answer_loss


@dataclasses.dataclass(frozen=True)
class Perturbation:
    """VILLA's constants."""

    steps: int = 3  # K
    lr: float = 0.1
    most: float = 0.0  # largest norm of a row's delta, 0 for any


def ascend(delta: Tensor, gradient: Tensor, plan: Perturbation) -> Tensor:
    """One step up, each row by its gradient's direction, and back into the ball where there is one."""
    norm = gradient.flatten(1).norm(dim=1).clamp(min=1e-12).view(-1, 1, 1)
    moved = delta + plan.lr * gradient / norm
    if plan.most:
        size = moved.flatten(1).norm(dim=1).clamp(min=1e-12).view(-1, 1, 1)
        moved = moved * (plan.most / size).clamp(max=1)
    return moved.detach()


def perturbed_logits(
    student: Any,
    words: Float[Tensor, "nC l h"],
    regions: Float[Tensor, "nC r h"],
    mask: Bool[Tensor, "nC lr"],
    clean: Float[Tensor, "n classes"],
    target: Float[Tensor, "n classes"],
) -> Float[Tensor, "n K classes"]:
    """Predictions at each delta on the way up; gradients reach the student's parameters, never delta's past."""
    plan, found = student.perturbation, []
    both = [torch.zeros_like(words), torch.zeros_like(regions)]
    for k in range(plan.steps):
        which = k % 2
        with torch.enable_grad():  # micro-batches come here without
            both[which] = both[which].detach().requires_grad_()
            hidden = student.encode(words + both[0], regions + both[1], mask)
            logits = student.choose(student.bert.pooler(hidden), len(clean))
            loss = answer_loss(logits, target, many=student.shape.several_right).sum()
            (gradient,) = torch.autograd.grad(loss, both[which], retain_graph=True)
        both[which] = ascend(both[which], gradient, plan)
        found.append(logits if torch.is_grad_enabled() else logits.detach())
    return torch.stack(found, 1)
