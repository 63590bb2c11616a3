"""clip: contrastive training without a teacher, the baseline of every other recipe.

CLIP (Radford et al., 2021), V and S the rows of normalized image and text embeddings of N pairs:

    L = 1/2 [CE(a V S^T, I) + CE(a S V^T, I)],  a = exp(logit_scale) <= 100

logit_scale starts at ln(1/0.07). From scratch, or fine-tuning with `--set init=FOLDER`.

    student train --recipe clip --data data/demo
"""

import dataclasses
from typing import TYPE_CHECKING

from student.recipe import Batch, Notes, Outputs, Progress, Recipe, Setting, Terms

if TYPE_CHECKING:
    from student.contract import Student


@dataclasses.dataclass(frozen=True)
class Constants:
    """CLIP has none beyond its model."""

    model: str = "vit-tiny"  # a tiny configuration of ours or any open_clip model
    init: str = ""  # a run or exported folder to start from


def student_fields(constants: Constants) -> tuple[str, ...]:
    """Return the cached fields that the student itself reads: none, unless it trains on cached features."""
    from student.models.named import fields_read_by

    return fields_read_by(constants.model)


def build(constants: Constants, setting: Setting) -> "Student":
    """Build the student by name."""
    return build_by_name(constants.model, constants.init)


def build_by_name(model: str, init: str) -> "Student":
    """Build a student of pairs, for every recipe that trains one."""
    from student.models.named import build_student

    return build_student(model, init)


def loss(outputs: Outputs, fields: Batch, constants: Constants, progress: Progress) -> tuple[Terms, Notes]:
    """Compute symmetric InfoNCE over the global batch."""
    return contrastive_loss(outputs)


def contrastive_loss(outputs: Outputs) -> tuple[Terms, Notes]:
    """Compute CLIP's loss from raw `image`, `text` [N, d] and the scalar `scale`."""
    from torch.nn.functional import normalize

    from student.losses import clip_loss

    V, S = normalize(outputs["image"].float()), normalize(outputs["text"].float())
    return {"task": clip_loss(V, S, outputs["scale"])}, {"scale": outputs["scale"].detach()}


CLIP = Recipe(
    name="clip",
    paper="Learning Transferable Visual Models From Natural Language Supervision (2021)",
    doc="no teacher: the baseline",
    constants=Constants(),
    student=build,
    loss=loss,
    teacher_fields=student_fields,
)
