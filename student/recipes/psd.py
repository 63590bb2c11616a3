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

from student.recipe import Now, Optim, Recipe
from student.recipes import clip
from teachercache.core.errors import UserError


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


def reads(constants: Constants) -> tuple[str, ...]:
    """Nothing, unless a cache stands in for the model."""
    if constants.teacher not in ("self", "cache"):
        raise UserError(f"--set teacher={constants.teacher}: choose self or cache")
    return ("image_emb", "text_emb") if constants.teacher == "cache" else ()


def build(constants: Constants):
    """The student by name; shares and temperatures that make no sense are refused."""
    for name in ("alpha_start", "alpha_end"):
        if not 0 <= getattr(constants, name) <= 1:
            raise UserError(f"--set {name}={getattr(constants, name):g}: a share is expected, from 0 to 1")
    if constants.teacher_temperature <= 0:
        raise UserError(f"--set teacher_temperature={constants.teacher_temperature:g}: it must be above 0")
    alpha(constants, Now(0, 1))
    return clip.build(constants)


def alpha(constants: Constants, now: Now) -> float:
    """The share of unaligned pairs in a step."""
    done = now.step / max(1, now.steps - 1)
    ramps = {"cosine": (1 - math.cos(math.pi * done)) / 2, "linear": done, "constant": 1.0}
    if constants.schedule not in ramps:
        raise UserError(f"--set schedule={constants.schedule}: choose from {', '.join(ramps)}")
    return constants.alpha_start + (constants.alpha_end - constants.alpha_start) * ramps[constants.schedule]


def draw_unaligned(rows: int, share: float, step: int):
    """Which pairs are called unaligned in a step, bool [rows]: the same on every rank, and in a resumed run."""
    import torch

    order = torch.randperm(rows, generator=torch.Generator().manual_seed(step))
    return order < round(share * rows)


def loss(student: dict, batch: dict, constants: Constants, now: Now) -> tuple[dict, dict]:
    """One term over the global batch; `unaligned` is alpha as it was rounded."""
    from torch.nn.functional import normalize

    from student.losses import psd_loss

    V, S = normalize(student["image"].float()), normalize(student["text"].float())
    V_T, S_T = V.detach(), S.detach()
    if constants.teacher == "cache":
        V_T, S_T = normalize(batch["image_emb"].float()), normalize(batch["text_emb"].float())
    unaligned = draw_unaligned(len(V), alpha(constants, now), now.step).to(V.device)
    term = psd_loss(V, S, student["scale"], V_T, S_T, 1 / constants.teacher_temperature, unaligned)
    return {"psd": term}, {"scale": student["scale"].detach(), "unaligned": unaligned.float().mean()}


PSD = Recipe(
    name="psd",
    paper="Robust Cross-Modal Representation Learning with Progressive Self-Distillation (2022)",
    doc="the model teaches itself, more with every step: for noisy pairs",
    constants=Constants(),
    build=build,
    heads=None,
    loss=loss,
    reads=reads,
    across=("image", "text", "image_emb", "text_emb"),
    optim=Optim(weight_decay=1e-3, warmup=0.2),
)
