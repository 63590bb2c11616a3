"""The contrastive losses of N pairs in O(N D) memory: the N x N logits are computed tile by tile.

`papers` defines the losses. `autograd` implements their gradients and has the legend of X, Y, Z, U, W and T.
"""

import dataclasses
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from student.losses.autograd import BothDirections, RowsOnly, Targets, TaskGradients, swapped
from student.losses.tiles import Logits, tile_size

Scale = Float[Tensor, "..."] | float

# CPU time of forward and backward, relative to whole matrices, at 512, 1024, 2048, 4096 and 8192 rows (one
# thread, D = 512):
#     task           1.17, 0.89, 0.83, 0.75, 0.65
#     CRD            1.22, 1.02, 1.00, 0.73, 0.60
#     both at once   0.69, 0.65, 0.60, 0.44, 0.38
#     ICL            0.89, 0.97, 0.97, 0.82, 0.78
#     GD             1.26, 1.29, 1.25, 1.22, 1.16   (18 matrix products in place of 12, to save memory)
# The value for CUDA is not measured: at 8192 rows one whole matrix takes 256 MiB.
TILED_FROM = {"cpu": 2048, "cuda": 8192}


def pays(rows: Float[Tensor, "n d"], *teacher: Tensor | float) -> bool:
    """Return whether the tiled form is the better choice for this batch.

    Args:
        rows: Embeddings of the batch; the choice depends on their number and device.
        teacher: The teacher's tensors; if any requires a gradient, the tiled form cannot be used.
    """
    trained = any(isinstance(value, Tensor) and value.requires_grad for value in teacher)
    return len(rows) >= TILED_FROM.get(rows.device.type, TILED_FROM["cuda"]) and not trained


def _wide(*tensors: Tensor) -> list[Tensor]:
    """Cast each tensor to float32; float64 tensors stay as they are."""
    return [tensor if tensor.dtype == torch.float64 else tensor.float() for tensor in tensors]


def _logits(X: Tensor, Y: Tensor, a: Scale) -> Logits:
    """Return the logits a X Y^T with everything in one dtype, at least float32."""
    X, Y = _wide(X, Y)
    return Logits(X, Y, torch.as_tensor(a, dtype=X.dtype, device=X.device).reshape(()))


def _teacher(U: Tensor, W: Tensor, b: Scale) -> Logits:
    """Return the logits of a frozen teacher."""
    logits = _logits(U, W, b)
    if any(tensor.requires_grad for tensor in (logits.X, logits.Y, logits.a)):
        raise ValueError(
            "the tiled losses compute no gradient for the teacher: detach() its embeddings and its scale"
        )
    return logits


def _apply(function: type[torch.autograd.Function], student: Logits, *others: Any, tile: int) -> Any:
    """Apply an autograd function with autocast disabled, which would compute the tiles in bfloat16."""
    with torch.autocast(student.X.device.type, enabled=False):
        size = tile or tile_size(student.X)
        return function.apply(student.X, student.Y, student.a, *others, size)


def _both(
    student: Logits,
    targets: Targets | None,
    *,
    hard: Tensor | int = 1,
    soft: Tensor | int = 1,
    kl: bool = True,
    tile: int = 0,
) -> tuple[Tensor, Tensor]:
    """Compute the hard and the soft loss, with weights hard_i / 2N and soft_i / 2N for pair i."""
    half = student.X.new_full((len(student.X),), 0.5 / len(student.X))
    return _apply(BothDirections, student, targets, hard * half, soft * half, kl, tile=tile)


def tiled_clip(
    image: Float[Tensor, "n d"], text: Float[Tensor, "n d"], scale: Scale, *, tile: int = 0
) -> Float[Tensor, ""]:
    """Compute `papers.clip_loss` tile by tile."""
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
    """Compute `papers.crd_loss` tile by tile."""
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
    """Compute `papers.clip_crd_losses` from one set of tiles: six matrix products instead of ten."""
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
    """Compute `papers.soft_clip_loss` tile by tile: CRD plus the entropy of the teacher's softmax."""
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
    """Compute `papers.psd_loss` tile by tile."""
    student, teacher = _logits(image, text, scale), _teacher(t_image, t_text, t_scale)
    with torch.autocast(image.device.type, enabled=False):
        targets = swapped(teacher, tile or tile_size(image))
    hard, soft = _both(student, targets, hard=~unaligned, soft=unaligned, tile=tile)
    return hard + soft


def tiled_icl(
    image: Float[Tensor, "n d"],
    text: Float[Tensor, "n d"],
    t_image: Float[Tensor, "n d"],
    t_text: Float[Tensor, "n d"],
    scale: Scale,
    *,
    tile: int = 0,
) -> Float[Tensor, ""]:
    """Compute `papers.icl_loss` stripe by stripe; the teacher's embeddings may require a gradient."""
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
    """Compute `papers.cross_kd_loss` stripe by stripe."""
    grad, image_to_text = torch.is_grad_enabled(), _teacher(t_image, t_text, t_scale)
    text_to_image = dataclasses.replace(image_to_text, X=image_to_text.Y, Y=image_to_text.X)
    forward = _apply(RowsOnly, _logits(image, t_text, scale), image_to_text, grad, tile=tile)
    return (forward + _apply(RowsOnly, _logits(text, t_image, scale), text_to_image, grad, tile=tile)) / 2


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
    """Compute `papers.gd_loss` tile by tile."""
    return _apply(TaskGradients, _logits(image, text, scale), _teacher(t_image, t_text, t_scale), tile=tile)
