"""The contrastive losses of N pairs in O(N D) memory: no N x N matrix is ever whole. `papers` defines them.

`autograd` has their gradients and the legend of X, Y, Z, U, W, T.
"""

import dataclasses
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from student.losses.autograd import BothDirections, RowsOnly, Targets, TaskGradients, swapped
from student.losses.tiles import Logits, tile_size

Scale = Float[Tensor, "..."] | float

# Processor seconds of forward and backward, whole matrices 1, one thread, D 512, at 512, 1024, 2048, 4096, 8192 rows:
#     task 1.17, 0.89, 0.83, 0.75, 0.65    CRD 1.22, 1.02, 1.00, 0.73, 0.60    both at once 0.69, 0.65, 0.60, 0.44, 0.38
#     ICL 0.89, 0.97, 0.97, 0.82, 0.78     GD 1.26, 1.29, 1.25, 1.22, 1.16 (18 products of matrices, not 12: for memory)
# CUDA is not measured: from there on one whole matrix has 256 MiB.
TILED_FROM = {"cpu": 2048, "cuda": 8192}


def pays(rows: Float[Tensor, "n d"], *teacher: Tensor | float) -> bool:
    """Whether there are so many rows that tiles are better than whole matrices; never where a teacher learns."""
    learns = any(isinstance(part, Tensor) and part.requires_grad for part in teacher)
    return len(rows) >= TILED_FROM.get(rows.device.type, TILED_FROM["cuda"]) and not learns


def _wide(*tensors: Tensor) -> list[Tensor]:
    return [tensor if tensor.dtype == torch.float64 else tensor.float() for tensor in tensors]


def _logits(X: Tensor, Y: Tensor, a: Scale) -> Logits:
    """Everything in one dtype, float32 at least."""
    X, Y = _wide(X, Y)
    return Logits(X, Y, torch.as_tensor(a, dtype=X.dtype, device=X.device).reshape(()))


def _teacher(U: Tensor, W: Tensor, b: Scale) -> Logits:
    """The logits of a teacher, which gets no gradient."""
    logits = _logits(U, W, b)
    if any(part.requires_grad for part in (logits.X, logits.Y, logits.a)):
        raise ValueError("the tiled losses give a teacher no gradient: detach() its embeddings and its scale")
    return logits


def _apply(function: type[torch.autograd.Function], student: Logits, *others: Any, tile: int) -> Any:
    """Outside of autocast, which would compute the tiles in bfloat16."""
    with torch.autocast(student.X.device.type, enabled=False):
        size = tile or tile_size(student.X)
        return function.apply(student.X, student.Y, student.a, *others, size)


def _both(
    student: Logits, targets: Targets | None, *, hard: Any = 1, soft: Any = 1, kl: bool = True, tile: int = 0
) -> tuple[Tensor, Tensor]:
    """Hard and soft loss, pair i weighing hard_i / 2N and soft_i / 2N."""
    half = student.X.new_full((len(student.X),), 0.5 / len(student.X))
    return _apply(BothDirections, student, targets, hard * half, soft * half, kl, tile=tile)


def tiled_clip(
    image: Float[Tensor, "n d"], text: Float[Tensor, "n d"], scale: Scale, *, tile: int = 0
) -> Float[Tensor, ""]:
    """losses.clip_loss."""
    return _both(_logits(image, text, scale), None, tile=tile)[0]


def tiled_crd(
    image: Float[Tensor, "n d"],
    text: Float[Tensor, "n d"],
    scale: Scale,
    t_image: Float[Tensor, "n e"],
    t_text: Float[Tensor, "n e"],
    t_scale: Scale,
    *,
    tile: int = 0,
) -> Float[Tensor, ""]:
    """losses.crd_loss."""
    teacher = Targets(_teacher(t_image, t_text, t_scale))
    return _both(_logits(image, text, scale), teacher, hard=0, tile=tile)[1]


def tiled_clip_crd(
    image: Float[Tensor, "n d"],
    text: Float[Tensor, "n d"],
    scale: Scale,
    t_image: Float[Tensor, "n e"],
    t_text: Float[Tensor, "n e"],
    t_scale: Scale,
    *,
    tile: int = 0,
) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
    """losses.clip_loss and losses.crd_loss from one set of tiles: six products of matrices instead of ten."""
    return _both(_logits(image, text, scale), Targets(_teacher(t_image, t_text, t_scale)), tile=tile)


def tiled_soft_clip(
    image: Float[Tensor, "n d"],
    text: Float[Tensor, "n d"],
    scale: Scale,
    t_image: Float[Tensor, "n e"],
    t_text: Float[Tensor, "n e"],
    t_scale: Scale,
    *,
    tile: int = 0,
) -> Float[Tensor, ""]:
    """1/2 [CE(a V S^T, sm(a_T V_T S_T^T)) + CE(a S V^T, sm(a_T S_T V_T^T))]: CRD and the teacher's entropy."""
    teacher = Targets(_teacher(t_image, t_text, t_scale))
    return _both(_logits(image, text, scale), teacher, hard=0, kl=False, tile=tile)[1]


def tiled_psd(
    image: Float[Tensor, "n d"],
    text: Float[Tensor, "n d"],
    scale: Scale,
    t_image: Float[Tensor, "n e"],
    t_text: Float[Tensor, "n e"],
    t_scale: Scale,
    unaligned: Bool[Tensor, " n"],
    *,
    tile: int = 0,
) -> Float[Tensor, ""]:
    """1/N sum over aligned pairs of CE to the diagonal, over unaligned ones of KL to the swapped targets (PSD).

    Both directions, halved. The swapped target of an image's row is the transpose of the teacher's text-to-image
    softmax with its rows renormalised. In PSD the teacher is the model itself, detached.
    """
    student, teacher = _logits(image, text, scale), _teacher(t_image, t_text, t_scale)
    with torch.autocast(image.device.type, enabled=False):
        targets = swapped(teacher, tile or tile_size(image))
    return sum(_both(student, targets, hard=~unaligned, soft=unaligned, tile=tile))


def tiled_icl(
    image: Float[Tensor, "n d"],
    text: Float[Tensor, "n d"],
    t_image: Float[Tensor, "n d"],
    t_text: Float[Tensor, "n d"],
    scale: Scale,
    *,
    tile: int = 0,
) -> Float[Tensor, ""]:
    """losses.icl_loss; here the teacher may learn."""
    grad = torch.is_grad_enabled()
    forward = _apply(RowsOnly, _logits(image, t_text, scale), None, grad, tile=tile)
    return (forward + _apply(RowsOnly, _logits(text, t_image, scale), None, grad, tile=tile)) / 2


def tiled_cross(
    image: Float[Tensor, "n d"],
    text: Float[Tensor, "n d"],
    t_image: Float[Tensor, "n d"],
    t_text: Float[Tensor, "n d"],
    scale: Scale,
    t_scale: Scale,
    *,
    tile: int = 0,
) -> Float[Tensor, ""]:
    """CRD whose student logits are g V' S_T^T and g S' V_T^T (CLIP-KD)."""
    grad, there = torch.is_grad_enabled(), _teacher(t_image, t_text, t_scale)
    back = dataclasses.replace(there, X=there.Y, Y=there.X)
    forward = _apply(RowsOnly, _logits(image, t_text, scale), there, grad, tile=tile)
    return (forward + _apply(RowsOnly, _logits(text, t_image, scale), back, grad, tile=tile)) / 2


def tiled_gd(
    image: Float[Tensor, "n d"],
    text: Float[Tensor, "n d"],
    scale: Scale,
    t_image: Float[Tensor, "n d"],
    t_text: Float[Tensor, "n d"],
    t_scale: Scale,
    *,
    tile: int = 0,
) -> Float[Tensor, ""]:
    """Gradient distillation (CLIP-KD, appendix Eq. 1-7): mean over pairs of |G_V,T - G_V|^2 + |G_S,T - G_S|^2."""
    return _apply(TaskGradients, _logits(image, text, scale), _teacher(t_image, t_text, t_scale), tile=tile)
