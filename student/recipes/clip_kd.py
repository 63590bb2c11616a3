"""clip_kd: CLIP-KD, an empirical study of CLIP model distillation (Yang et al., CVPR 2024).

V, S student, V_T, S_T teacher embeddings, rows normalised; a_S, a_T their scales; g a learnable scale of its own;
V' = V where the widths agree, else norm(linear(raw student feature)). Task loss and CRD use V, S themselves.

    Task  1/2 [CE(a_S V S^T, I) + CE(a_S S V^T, I)]
    CRD   1/2 [KL(sm(a_T V_T S_T^T) || sm(a_S V S^T)) + KL(sm(a_T S_T V_T^T) || sm(a_S S V^T))]
    FD    mean over pairs and dims of (V' - V_T)^2, plus the same for text
    ICL   1/2 [CE(g V' S_T^T, I) + CE(g S' V_T^T, I)]
    L     task Task + crd CRD + fd FD + icl ICL                with weights 1, 1, 2000, 1

Everything is a function of the cached image_emb, text_emb and logit_scale: no teacher runs.

    tc build --teacher clip-lite && student train --recipe clip_kd
"""

import dataclasses

from student.recipe import Now, Recipe
from student.recipes import clip


@dataclasses.dataclass(frozen=True)
class Constants:
    """Weights of the terms (section 3 and appendix of the paper) and the student."""

    task: float = 1.0
    crd: float = 1.0
    fd: float = 2000.0  # for a 512-d teacher; 2000 FD = 7.8 (1 - cos) per modality there
    icl: float = 1.0
    model: str = "vit-tiny"
    init: str = ""


def heads(constants, student, shapes):
    """Linear maps to the teacher's widths where they differ, and ICL's own scale g."""
    from student.models.projection import TeacherSpace
    from teachercache.runtime import say

    dim = shapes["image_emb"][-1]
    say(f"fd={constants.fd:g} over {dim} dimensions weighs {2 * constants.fd / dim:.3g} (1 - cos) per modality")
    return TeacherSpace(student.widths, (shapes["image_emb"][-1], shapes["text_emb"][-1]))


def loss(student: dict, batch: dict, constants: Constants, now: Now) -> tuple[dict, dict]:
    """Task + CRD + 2000 FD + ICL over the global batch; a term of weight 0 is not computed."""
    from torch.nn.functional import normalize

    from student import losses

    V, S = normalize(student["image"].float()), normalize(student["text"].float())
    V_, S_ = normalize(student["image_t"].float()), normalize(student["text_t"].float())
    V_T, S_T = normalize(batch["image_emb"].float()), normalize(batch["text_emb"].float())
    a, a_T, g = student["scale"], batch["logit_scale"].exp(), student["icl_scale"]
    terms = {
        "task": lambda: losses.clip_loss(V, S, a),
        "crd": lambda: losses.crd_loss(V, S, a, V_T, S_T, a_T),
        "fd": lambda: losses.fd_loss(V_, S_, V_T, S_T),
        "icl": lambda: losses.icl_loss(V_, S_, V_T, S_T, g),
    }
    weights = {name: getattr(constants, name) for name in terms}
    weighted = {name: weights[name] * term() for name, term in terms.items() if weights[name]}
    notes = {"scale": a.detach(), "icl_scale": g.detach(), "cos_image": (V_ * V_T).sum(1).mean().detach()}
    return weighted, notes


CLIP_KD = Recipe(
    name="clip_kd",
    paper="CLIP-KD: An Empirical Study of CLIP Model Distillation (2024)",
    doc="relations, features and cross-modal contrast of a cached CLIP teacher",
    constants=Constants(),
    build=clip.build,
    heads=heads,
    loss=loss,
    reads=("image_emb", "text_emb"),
    across=("image", "text", "image_t", "text_t", "image_emb", "text_emb"),
)
