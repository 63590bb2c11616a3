"""Two recipes: pairs with a per-pair teacher field, and questions."""

# --8<-- [start:imports]
import dataclasses

import numpy as np
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, normalize

from student.contract import Student
from student.losses import clip_loss
from student.recipe import Batch, Noise, Notes, Outputs, Progress, Recipe, Setting, Shapes, Terms
from student.rows import Questions
from visitor.losses import huber_loss
from visitor.students import Chooser, Two

# --8<-- [end:imports]


# --8<-- [start:constants]
@dataclasses.dataclass(frozen=True)
class PairConstants:
    """Weights and a width."""

    width: int = 6
    huber: float = 0.5
    dropout: float = 0.0


# --8<-- [end:constants]


# --8<-- [start:heads]
def build_two(constants: PairConstants, setting: Setting) -> Student:
    """Build the student."""
    return Two(constants.width, constants.dropout)


class ToAffinity(nn.Module):
    """Maps the product of both embeddings to the teacher's per-pair vector."""

    def __init__(self, width: int, out: int):
        super().__init__()
        self.linear = nn.Linear(width, out)

    def forward(self, values: Batch) -> dict[str, Tensor]:
        """Compute `affinity` [n, out]."""
        return {"affinity_hat": self.linear(values["image"] * values["text"])}


def affinity_head(constants: PairConstants, student: Student, shapes: Shapes) -> nn.Module:
    """Build the map to the teacher's width."""
    return ToAffinity(constants.width, shapes["affinity"][-1])


# --8<-- [end:heads]


# --8<-- [start:noise]
def jitter(constants: PairConstants, shapes: Shapes) -> dict[str, Noise]:
    """Return a little noise for the teacher's field."""
    return {"jitter": lambda random: random.standard_normal(shapes["affinity"], np.float32)}


# --8<-- [end:noise]


# --8<-- [start:loss]
def pair_loss(
    outputs: Outputs, fields: Batch, constants: PairConstants, progress: Progress
) -> tuple[Terms, Notes]:
    """Compute CLIP's loss and a Huber distance to the teacher's per-pair field."""
    image, text = normalize(outputs["image"].float()), normalize(outputs["text"].float())
    target = fields["affinity"] + 0.01 * fields["jitter"]
    terms = {
        "task": clip_loss(image, text, outputs["scale"]),
        "huber": constants.huber * huber_loss(outputs["affinity_hat"], target),
    }
    return terms, {"scale": outputs["scale"].detach()}


# --8<-- [end:loss]


# --8<-- [start:pairs]
PAIRS = Recipe(
    name="visitor_pairs",
    paper="Visitors (2026)",
    doc="a per-pair field",
    constants=PairConstants(),
    student=build_two,
    distill_heads=affinity_head,
    loss=pair_loss,
    teacher_fields=lambda constants: ("affinity",),
    loss_fields=("affinity", "jitter"),
    sample_noise=jitter,
    teacher="visitor-pairs",
    steps=6,
    batch=8,
)
# --8<-- [end:pairs]


# --8<-- [start:questions]
@dataclasses.dataclass(frozen=True)
class QuestionConstants:
    """How long texts are."""

    length: int = 24


def question_rows(constants: QuestionConstants) -> Questions:
    """Return VCR's first question, or whatever else the data asks."""
    return Questions(mode="q2a", max_text=constants.length)


def build_chooser(constants: QuestionConstants, setting: Setting) -> Student:
    """Build the student of a task."""
    grid = int(np.prod(setting.shapes["grid"]))
    task, words = setting.task, setting.tokenizer.get_vocab_size()
    return Chooser(words, grid, task.classes, task.inputs)


def question_loss(
    outputs: Outputs, fields: Batch, constants: QuestionConstants, progress: Progress
) -> tuple[Terms, Notes]:
    """Compute cross-entropy over the labeled rows."""
    each = cross_entropy(outputs["logits"].float(), fields["target"], reduction="none")
    return {"task": (each * fields["labeled"]).mean()}, {}


QUESTIONS = Recipe(
    name="visitor_questions",
    paper="Visitors (2026)",
    doc="answers from a grid",
    constants=QuestionConstants(),
    rows=question_rows,
    student=build_chooser,
    loss=question_loss,
    teacher_fields=lambda constants: ("grid",),
    loss_fields=("target", "labeled"),
    teacher="visitor-grid",
    steps=6,
    batch=8,
)
# --8<-- [end:questions]
