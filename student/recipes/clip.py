"""Train CLIP contrastively and without a teacher, as the baseline for every other recipe.

CLIP (Radford et al., 2021). V and S are the normalized image and text embeddings of N pairs, a row each:

    L = 1/2 [CE(a V S^T, I) + CE(a S V^T, I)],  a = exp(logit_scale) <= 100

logit_scale starts at ln(1/0.07). Training starts from scratch, or from the model in FOLDER
with `--set init=FOLDER`.

    student train --recipe clip --data data/demo
"""

import dataclasses
from typing import TYPE_CHECKING, Protocol

from student.recipe import Batch, Notes, Outputs, Progress, Recipe, Setting, Terms
from teachercache.core.ranges import Name

if TYPE_CHECKING:
    from student.contract import Student


@dataclasses.dataclass(frozen=True)
class Constants:
    """The student model: CLIP has no further constants."""

    model: Name = "vit-tiny"  # one of our tiny configurations, or any open_clip model
    init: str = ""  # a run folder or exported folder to start from


class PairStudent(Protocol):
    """A student of image-text pairs, as far as distillation heads read it."""

    @property
    def widths(self) -> tuple[int, int]:
        """Widths of the raw image and text embeddings."""


def student_fields(constants: Constants) -> tuple[str, ...]:
    """Return the cached fields that the student itself reads: none, unless it trains on cached features."""
    return fields_by_name(constants.model)


def fields_by_name(model: str) -> tuple[str, ...]:
    """Return the cached fields that a student model reads, for every recipe that trains on pairs."""
    from student.models.named import fields_read_by

    return fields_read_by(model)


def build(constants: Constants, setting: Setting) -> "Student":
    """Build the student model named in the constants."""
    return build_by_name(constants.model, constants.init)


def build_by_name(model: str, init: str) -> "Student":
    """Build a student model of pairs, for every recipe that trains one.

    Args:
        model: One of our tiny configurations, or any open_clip model.
        init: A run folder or exported folder to start from; "" for random weights.
    """
    from student.models.named import build_student

    return build_student(model, init)


def loss(outputs: Outputs, fields: Batch, constants: Constants, progress: Progress) -> tuple[Terms, Notes]:
    """Compute the symmetric InfoNCE loss over the global batch."""
    return contrastive_loss(outputs)


def contrastive_loss(outputs: Outputs) -> tuple[Terms, Notes]:
    """Compute CLIP's loss over the global batch.

    Args:
        outputs: Raw embeddings `image` and `text` [N, d], and the scalar `scale` (a above).

    Returns:
        The term `task`, and the note `scale`.
    """
    from torch.nn.functional import normalize

    from student.losses import clip_loss

    V, S = normalize(outputs["image"].float()), normalize(outputs["text"].float())
    return {"task": clip_loss(V, S, outputs["scale"])}, {"scale": outputs["scale"].detach()}


CLIP = Recipe(
    name="clip",
    paper="Learning Transferable Visual Models From Natural Language Supervision (2021)",
    doc="contrastive training without a teacher: the baseline",
    constants=Constants(),
    student=build,
    loss=loss,
    teacher_fields=student_fields,
)
