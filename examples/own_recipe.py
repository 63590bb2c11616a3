"""A recipe of your own: match the teacher's similarities with a temperature that decreases during training.

    tc build --teacher clip-lite --data data/demo
    student train --recipe own_recipe:COOLING --data data/demo --set end=0.02

Run the second command in the folder of this file, or install the file as a package with an entry point:

    [options.entry_points]
    student.recipes =
        cooling = own_recipe:COOLING

With V, S the student's embeddings, V_T, S_T the teacher's, and tau the temperature of the teacher:

    task   1/2 [CE(a V S^T, I) + CE(a S V^T, I)]
    match  1/2 [CE(a V S^T, sm(V_T S_T^T / tau)) + CE(a S V^T, sm(S_T V_T^T / tau))]
    L      task + weight match
"""

import dataclasses

from torch.nn.functional import normalize

from student.contract import Student
from student.losses import clip_loss, soft_clip_loss
from student.recipe import Batch, Notes, Outputs, Progress, Recipe, Setting, Terms
from student.recipes.clip import build_by_name
from teachercache.core.ranges import Name, Positive, Weight


@dataclasses.dataclass(frozen=True)
class Constants:
    """Settings of the recipe. `--set` checks the ranges that the types declare."""

    weight: Weight = 1.0
    start: Positive = 0.1  # the teacher's temperature in the first step
    end: Positive = 0.01  # and in the last
    model: Name = "vit-tiny"
    init: str = ""  # a run folder or exported folder to start from


def build(constants: Constants, setting: Setting) -> Student:
    """Build a student of a built-in family."""
    return build_by_name(constants.model, constants.init)


def temperature(constants: Constants, progress: Progress) -> float:
    """Return tau, which changes by the same factor in every step."""
    done = progress.step / max(1, progress.steps - 1)
    return constants.start * (constants.end / constants.start) ** done


def loss(outputs: Outputs, fields: Batch, constants: Constants, progress: Progress) -> tuple[Terms, Notes]:
    """Compute the weighted terms over the global batch, and numbers for the log."""
    V, S, V_T, S_T = (
        normalize(rows.float())
        for rows in (outputs["image"], outputs["text"], fields["image_emb"], fields["text_emb"])
    )
    a, tau = outputs["scale"], temperature(constants, progress)
    terms = {
        "task": clip_loss(V, S, a),
        "match": constants.weight * soft_clip_loss(V, S, a, V_T, S_T, 1 / tau),
    }
    return terms, {"scale": a.detach(), "tau": a.new_tensor(tau)}


COOLING = Recipe(
    name="cooling",
    paper="An example",
    doc="similarities of a teacher that cools down",
    constants=Constants(),
    student=build,
    loss=loss,
    teacher_fields=lambda constants: ("image_emb", "text_emb"),
)
