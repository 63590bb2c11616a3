"""psd: progressive self-distillation (Andonian et al., CVPR 2022), for pairs that do not belong together as said.

V, S embeddings, rows normalised, N pairs of the global batch, a their scale. The model itself is the teacher: SG stops
the gradient, there is no second network and no second forward. A random share alpha of the pairs is called unaligned in
each step, and alpha grows with training:

    Z = a V S^T,  T = SG(V S^T) / tau_T
    R = the transpose of sm(T^T), rows renormalised: how the texts would share a picture, told by the texts themselves
    L_aligned    mean over aligned pairs of 1/2 [CE(Z, I) + CE(Z^T, I)]
    L_unaligned  mean over unaligned pairs of 1/2 [KL(R || sm(Z)) + KL(R' || sm(Z^T))],  R' the same of T^T
    L            (1 - alpha) L_aligned + alpha L_unaligned
    alpha        cosine: start + (end - start) (1 - cos(pi t)) / 2,  linear: start + (end - start) t,  constant: end,
                 t the share of the steps that are done

Negatives are shared over the whole batch. alpha N is rounded to whole pairs, so L is one mean over all of them. Free
choices, where the paper is silent: the range of alpha, the swap of the directions, how L adds up.

    student train --recipe psd --data data/demo
    student train --recipe psd --set schedule=linear --set alpha_end=0.5

With --set teacher=cache a frozen teacher's cached embeddings stand in the place of SG(V), SG(S): another method than
the paper's, for comparison.

    tc build --teacher clip-lite && student train --recipe psd --set teacher=cache
"""

import dataclasses
import math
from typing import TYPE_CHECKING

from student.recipe import Batch, Notes, Optim, Outputs, Progress, Recipe, Setting, Terms
from student.recipes import clip
from teachercache.core.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

    from student.contract import Student


@dataclasses.dataclass(frozen=True)
class Constants:
    """The paper's constants where it names them."""

    alpha_start: float = 0.0  # free choice
    alpha_end: float = 0.8  # free choice
    schedule: str = "cosine"  # or linear, constant
    teacher_temperature: float = 0.1  # tau_T
    teacher: str = "self"  # or cache
    model: str = "vit-tiny"
    init: str = ""


def teacher_fields(constants: Constants) -> tuple[str, ...]:
    """Return no field, unless a cache replaces the model as its teacher, or the student trains on features."""
    if constants.teacher not in ("self", "cache"):
        raise UserError(f"--set teacher={constants.teacher}: choose self or cache")
    return ("image_emb", "text_emb") if constants.teacher == "cache" else clip.student_fields(constants)


def build(constants: Constants, setting: Setting) -> "Student":
    """Build the student by name, and refuse shares and temperatures that make no sense."""
    for name in ("alpha_start", "alpha_end"):
        if not 0 <= getattr(constants, name) <= 1:
            raise UserError(f"--set {name}={getattr(constants, name):g}: a share is expected, from 0 to 1")
    if constants.teacher_temperature <= 0:
        raise UserError(f"--set teacher_temperature={constants.teacher_temperature:g}: it must be above 0")
    alpha(constants, Progress(0, 1))
    return clip.build_by_name(constants.model, constants.init)


def alpha(constants: Constants, progress: Progress) -> float:
    """Return the share of unaligned pairs in a step."""
    done = progress.step / max(1, progress.steps - 1)
    ramps = {"cosine": (1 - math.cos(math.pi * done)) / 2, "linear": done, "constant": 1.0}
    if constants.schedule not in ramps:
        raise UserError(f"--set schedule={constants.schedule}: choose from {', '.join(ramps)}")
    return constants.alpha_start + (constants.alpha_end - constants.alpha_start) * ramps[constants.schedule]


def draw_unaligned(rows: int, share: float, step: int) -> "Tensor":
    """Draw which pairs count as unaligned in a step, bool [rows]: the same on every rank, and in a resumed run."""
    import torch

    order = torch.randperm(rows, generator=torch.Generator().manual_seed(step))
    return order < round(share * rows)


def loss(outputs: Outputs, fields: Batch, constants: Constants, progress: Progress) -> tuple[Terms, Notes]:
    """Compute one term over the global batch; the note `unaligned` is alpha as it was rounded."""
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
    doc="the model teaches itself, more with every step: for noisy pairs",
    constants=Constants(),
    student=build,
    loss=loss,
    teacher_fields=teacher_fields,
    optim=Optim(weight_decay=1e-3, warmup=0.2),
)
