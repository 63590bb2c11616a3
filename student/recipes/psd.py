"""Train CLIP by progressive self-distillation on noisy pairs (PSD, Andonian et al., CVPR 2022).

V, S are the normalized image and text embeddings of the N pairs in the global batch, a is their logit scale.
The model is its own teacher: SG stops the gradient, and there is no second network or forward pass. In each
step, a random share alpha of the pairs is treated as unaligned, and alpha grows during training:

    Z = a V S^T,  T = SG(V S^T) / tau_T
    R = the transpose of sm(T^T), rows renormalized: soft targets, from each text's softmax over pictures
    L_aligned    mean over aligned pairs of 1/2 [CE(Z, I) + CE(Z^T, I)]
    L_unaligned  mean over unaligned pairs of 1/2 [KL(R || sm(Z)) + KL(R' || sm(Z^T))],  R' the same of T^T
    L            (1 - alpha) L_aligned + alpha L_unaligned
    alpha        cosine: start + (end - start) (1 - cos(pi t)) / 2,  linear: start + (end - start) t,
                 constant: end,  t the share of the steps that are done

All pairs of the batch serve as negatives. alpha N is rounded to whole pairs, so L is one mean over all pairs.
Free choices, where the paper gives no detail: the range of alpha, the swap of directions in R, and how L
combines its terms.

    student train --recipe psd --data data/demo
    student train --recipe psd --set schedule=linear --set alpha_end=0.5

With --set teacher=cache, the cached embeddings of a frozen teacher replace SG(V), SG(S). This is not the
paper's method; it serves as a comparison.

    tc build --teacher clip-lite && student train --recipe psd --set teacher=cache
"""

import dataclasses
import math
from typing import TYPE_CHECKING, Literal

from student.recipe import Batch, Notes, Optim, Outputs, Progress, Recipe, Setting, Terms
from student.recipes import clip
from teachercache.core.ranges import Name, Positive, Share, check_record

if TYPE_CHECKING:
    from torch import Tensor

    from student.contract import Student


@dataclasses.dataclass(frozen=True)
class Constants:
    """The paper's constants, with its values where it gives them, and the student model."""

    alpha_start: Share = 0.0  # free choice
    alpha_end: Share = 0.8  # free choice
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    teacher_temperature: Positive = 0.1  # tau_T
    teacher: Literal["self", "cache"] = "self"
    model: Name = "vit-tiny"
    init: str = ""


def teacher_fields(constants: Constants) -> tuple[str, ...]:
    """Return the teacher's embeddings for teacher=cache, else the fields that the student itself reads."""
    check_record(constants)
    return ("image_emb", "text_emb") if constants.teacher == "cache" else clip.fields_by_name(constants.model)


def build(constants: Constants, setting: Setting) -> "Student":
    """Build the student model."""
    return clip.build_by_name(constants.model, constants.init)


def alpha(constants: Constants, progress: Progress) -> float:
    """Return alpha, the share of unaligned pairs in a step."""
    done = progress.step / max(1, progress.steps - 1)
    ramps = {"cosine": (1 - math.cos(math.pi * done)) / 2, "linear": done, "constant": 1.0}
    return constants.alpha_start + (constants.alpha_end - constants.alpha_start) * ramps[constants.schedule]


def draw_unaligned(rows: int, share: float, step: int) -> "Tensor":
    """Draw the pairs that a step treats as unaligned: the same on every rank and in a resumed run.

    Args:
        rows: Number of pairs N in the global batch.
        share: alpha.
        step: Seed of the draw.

    Returns:
        Mask of the unaligned pairs, bool [rows].
    """
    import torch

    order = torch.randperm(rows, generator=torch.Generator().manual_seed(step))
    return order < round(share * rows)


def loss(outputs: Outputs, fields: Batch, constants: Constants, progress: Progress) -> tuple[Terms, Notes]:
    """Compute L over the global batch.

    Returns:
        The term `psd`; the notes `scale` and `unaligned`, which is alpha rounded to whole pairs.
    """
    from torch.nn.functional import normalize

    from student.losses import psd_loss

    V, S = normalize(outputs["image"].float()), normalize(outputs["text"].float())
    V_T, S_T = V.detach(), S.detach()
    if constants.teacher == "cache":
        V_T, S_T = normalize(fields["image_emb"].float()), normalize(fields["text_emb"].float())
    unaligned = draw_unaligned(len(V), alpha(constants, progress), progress.step).to(V.device)
    term = psd_loss(V, S, outputs["scale"], V_T, S_T, 1 / constants.teacher_temperature, unaligned)
    return {"psd": term}, {"scale": outputs["scale"].detach(), "unaligned": unaligned.float().mean()}


PSD = Recipe(
    name="psd",
    paper="Robust Cross-Modal Representation Learning with Progressive Self-Distillation (2022)",
    doc="self-distillation with a growing share of soft targets, for noisy pairs",
    constants=Constants(),
    student=build,
    loss=loss,
    teacher_fields=teacher_fields,
    optim=Optim(weight_decay=1e-3, warmup=0.2),
)
