"""Compute VILLA's predictions under adversarial perturbations of its embeddings (Gan et al., 2020).

delta starts at 0 and takes K ascent steps on the task loss, delta <- P(delta + lr g / |g|), where each row's
gradient is divided by its norm. The recipe trains on the loss at every delta and on the divergence from the
clean prediction. VILLA perturbs one modality at a time; here words and regions alternate from step to step
(free choice).
"""

import dataclasses
from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from student.losses import answer_loss


@dataclasses.dataclass(frozen=True)
class Perturbation:
    """VILLA's constants.

    Args:
        steps: K, the number of ascent steps.
        lr: The step size.
        most: The largest norm of a row's delta; 0 for no limit.
    """

    steps: int = 3
    lr: float = 0.1
    most: float = 0.0


def ascend(delta: Tensor, gradient: Tensor, plan: Perturbation) -> Tensor:
    """Take one ascent step along each row's normalized gradient, inside the ball of `plan.most`."""
    norm = gradient.flatten(1).norm(dim=1).clamp(min=1e-12).view(-1, 1, 1)
    moved = delta + plan.lr * gradient / norm
    if plan.most:
        size = moved.flatten(1).norm(dim=1).clamp(min=1e-12).view(-1, 1, 1)
        moved = moved * (plan.most / size).clamp(max=1)
    return moved.detach()


def perturbed_logits(
    predict: Callable[[Tensor, Tensor], Tensor],
    words: Float[Tensor, "nC l h"],
    regions: Float[Tensor, "nC r h"],
    target: Float[Tensor, "n classes"],
    *,
    plan: Perturbation,
    many: bool,
) -> Float[Tensor, "n K classes"]:
    """Compute the logits at each delta; gradients reach the student's parameters, but not earlier deltas.

    Args:
        predict: Word and region embeddings -> logits.
        words: Word embeddings.
        regions: Region embeddings.
        target: The target probability of each answer.
        plan: VILLA's constants.
        many: Several answers may be right (VQA).
    """
    perturbed = []
    both = [torch.zeros_like(words), torch.zeros_like(regions)]
    for k in range(plan.steps):
        which = k % 2
        with torch.enable_grad():  # micro-batches run with gradients disabled
            both[which] = both[which].detach().requires_grad_()
            logits = predict(words + both[0], regions + both[1])
            loss = answer_loss(logits, target, many=many).sum()
            (gradient,) = torch.autograd.grad(loss, both[which], retain_graph=True)
        both[which] = ascend(both[which], gradient, plan)
        perturbed.append(logits if torch.is_grad_enabled() else logits.detach())
    return torch.stack(perturbed, 1)
