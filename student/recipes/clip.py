"""clip: contrastive training without a teacher, the baseline of every other recipe.

CLIP (Radford et al., 2021):  L = 1/2 [CE(a V S^T, I) + CE(a S V^T, I)],  a = exp(logit_scale) <= 100,
logit_scale starts at ln(1/0.07). From scratch, or fine-tuning with `--set init=FOLDER`.

    student train --recipe clip --data data/demo
"""

import dataclasses

from student.recipe import Now, Recipe


@dataclasses.dataclass(frozen=True)
class Constants:
    """CLIP has none beyond its model."""

    model: str = "vit-tiny"  # a tiny configuration of ours or any open_clip model
    init: str = ""  # an exported folder to start from


def build(constants):
    """The student by name."""
    from student.models.registry import build_student

    return build_student(constants.model, constants.init)


def loss(student: dict, batch: dict, constants: Constants, now: Now) -> tuple[dict, dict]:
    """Symmetric InfoNCE over the global batch."""
    from torch.nn.functional import normalize

    from student.losses import clip_loss

    V, S = normalize(student["image"].float()), normalize(student["text"].float())
    return {"task": clip_loss(V, S, student["scale"])}, {"scale": student["scale"].detach()}


CLIP = Recipe(
    name="clip",
    paper="Learning Transferable Visual Models From Natural Language Supervision (2021)",
    doc="no teacher: the baseline",
    constants=Constants(),
    build=build,
    heads=None,
    loss=loss,
    across=("image", "text"),
)
