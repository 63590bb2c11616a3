"""Distill a CLIP teacher by relations, features and contrast (CLIP-KD, Yang et al., CVPR 2024).

V, S are the student's image and text embeddings, V_T, S_T the teacher's: N normalized rows each. a_S, a_T are
their logit scales. g, f are learnable scales: each is the exp of a parameter that is initialized and clamped
like CLIP's logit_scale. V', S' are the student's embeddings in the teacher's width: V, S themselves if the
widths agree, else norm(linear(raw student feature)). Task and CRD use V, S. H are outputs of inner blocks, H'
in the teacher's width.

    Task    1/2 [CE(a_S V S^T, I) + CE(a_S S V^T, I)]
    CRD     1/2 [KL(sm(a_T V_T S_T^T) || sm(a_S V S^T)) + KL(sm(a_T S_T V_T^T) || sm(a_S S V^T))]
    FD      mean over pairs and dims of (V' - V_T)^2, plus the same for text
    ICL     1/2 [CE(g V' S_T^T, I) + CE(g S' V_T^T, I)]
    MFD     FD with V' of masked pictures, from which a random share `mask_ratio` of the patches is left out
    GD      mean over pairs of |G_V,T - G_V|^2, plus the same for text; P = sm(a V' S'^T), Q = sm(a S' V'^T),
            G_V = a/2N [(P - I) S' + (Q - I)^T S'], G_S = a/2N [(Q - I) V' + (P - I)^T V']
            (appendix Eq. 1-7)
    AFD     1/2 [CE(f A B^T, I) + CE(f B A^T, I)],  A = norm(W [V'; V_T]), B = norm(W' [S'; S_T])
    cross   1/2 [KL(sm(a_T V_T S_T^T) || sm(g V' S_T^T)) + KL(sm(a_T S_T V_T^T) || sm(g S' V_T^T))]
    hidden  mean over pairs, dims and pairs of blocks of (H' - H_T)^2, plus the same for text
            (appendix Fig. 2)
    L       task Task + crd CRD + fd FD + icl ICL + mfd MFD + gd GD + afd AFD + cross cross + hidden hidden
            with weights 1, 1, 2000, 1, all others 0

A term with weight 0 is not computed, and its inputs are not needed. The paper's ablations are mfd=2000,
gd=1e8 and afd=1, each added alone to the task loss. GD shrinks as (a / N)^2. The paper's weight 1e8 fits the
released code, which divides by a where Eq. 1 has 1 / tau = a: with it, GD is a tenth of the loss of a new
student at N = 1024. Here gd=1000 gives about that share; the log reports the actual one as `gd_share`. Masked
pictures are used in MFD's V' alone; every other term uses whole pictures. AFD's W and W' map to the teacher's
widths. hidden normalizes H' and H_T as FD normalizes V' and V_T, and its pairs of blocks are settings:

    --set hidden=2000 --set hidden_image=3:7,5:11 --set hidden_text=1:11  # student:teacher block, from 0

`--cache A.zarr,B.zarr` distills several teachers. With ensemble=average, every term is the mean over the
teachers, each with its own heads. CRD then has the gradient of KL(mean of the teachers' softmaxes ||
student); its value is higher by the disagreement of the teachers, which is constant. With ensemble=concat,
the teachers act as one: their unit rows are concatenated and divided by sqrt(number of teachers), and a_T is
the mean of their scales.

All terms are functions of the cached image_emb, text_emb and logit_scale (hidden: image_hidden_<block>,
text_hidden_<block>), so no teacher runs during training.

    tc build --teacher clip-lite && student train --recipe clip_kd
    tc build --teacher clip-vit-b16 --outputs embeddings,hidden:7+11
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Any, Literal, cast

from annotated_types import Interval

from student.ensemble import num_teachers, of_teacher
from student.recipe import Batch, Notes, Outputs, Progress, Recipe, Setting, Shapes, Terms
from student.recipes import clip
from student.rows import Pairs
from teachercache.core.errors import UserError
from teachercache.core.ranges import Form, Name, Weight, check_record

if TYPE_CHECKING:
    from torch import Tensor, nn

    from student.contract import Student
    from student.models.two_tower.model import TwoTower


MaskRatio = Annotated[float, Interval(ge=0, lt=1)]
Blocks = Annotated[
    str,
    Form(r"\s*|(\s*\d{1,4}\s*:\s*\d{1,4}\s*(,|$))+", "pairs of blocks STUDENT:TEACHER are expected, as 3:7"),
]


@dataclasses.dataclass(frozen=True)
class Constants:
    """Weights of the terms (section 3 and appendix of the paper), and the student model."""

    task: Weight = 1.0
    crd: Weight = 1.0
    fd: Weight = 2000.0  # for a 512-d teacher, where 2000 FD = 7.8 (1 - cos) per modality
    icl: Weight = 1.0
    mfd: Weight = 0.0  # 2000 in the paper's ablation
    gd: Weight = 0.0  # 1e8 in the paper's ablation
    afd: Weight = 0.0  # 1 in the paper's ablation
    cross: Weight = 0.0
    hidden: Weight = 0.0
    mask_ratio: MaskRatio = 0.75
    hidden_image: Blocks = ""  # pairs of blocks STUDENT:TEACHER, separated by commas
    hidden_text: Blocks = ""
    ensemble: Literal["average", "concat"] = "average"  # free choice
    model: Name = "vit-tiny"
    init: str = ""


def block_pairs(constants: Constants) -> list[tuple[str, str]]:
    """Return the pairs that the term `hidden` compares, each once.

    Returns:
        (student output, teacher field) of each pair: hidden_image=3:7 is ("image_block_3", "image_hidden_7").

    Raises:
        UserError: A setting is no list of STUDENT:TEACHER, or both are empty.
    """
    pairs = []
    for tower, setting in (("image", constants.hidden_image), ("text", constants.hidden_text)):
        for pair in filter(None, setting.replace(" ", "").split(",")):
            student_block, colon, teacher_block = pair.partition(":")
            if not (colon and student_block.isdecimal() and teacher_block.isdecimal()):
                raise UserError(
                    f"--set hidden_{tower}={setting}: pairs of blocks STUDENT:TEACHER are expected, as 3:7"
                )
            pairs.append((f"{tower}_block_{int(student_block)}", f"{tower}_hidden_{int(teacher_block)}"))
    if not pairs:
        raise UserError(
            "--set hidden needs blocks: --set hidden_image=3:7 (block 3 of the student, 7 of the teacher) "
            "or hidden_text"
        )
    return list(dict.fromkeys(pairs))


def rows(constants: Constants) -> Pairs:
    """Return the kind of rows: pairs, with one teacher or an ensemble."""
    return Pairs(ensemble=constants.ensemble)


def teacher_fields(constants: Constants) -> tuple[str, ...]:
    """Return the teacher's fields that weighted terms compare, and the fields that the student reads."""
    check_record(constants)
    terms = ("crd", "fd", "icl", "mfd", "gd", "afd", "cross")
    embeddings = ("image_emb", "text_emb") if any(getattr(constants, name) for name in terms) else ()
    hidden = [field for _, field in block_pairs(constants)] if constants.hidden else []
    return tuple(dict.fromkeys((*embeddings, *hidden, *clip.fields_by_name(constants.model))))


def build(constants: Constants, setting: Setting) -> "Student":
    """Build the student model; if terms need them, its forward also outputs masked pictures and blocks."""
    from student.models.two_tower.model import add_block_outputs, add_masked_output
    from teachercache.core.progress import say

    for name, weight in (("mask_ratio", "mfd"), ("hidden_image", "hidden"), ("hidden_text", "hidden")):
        if getattr(constants, name) != getattr(Constants, name) and not getattr(constants, weight):
            say(f"WARNING: --set {name} does nothing while {weight}=0")
    student = clip.build_by_name(constants.model, constants.init)
    if constants.mfd:
        add_masked_output(student, constants.mask_ratio)
    if constants.hidden:
        add_block_outputs(student, [block for block, _ in block_pairs(constants)])
    return student


def heads(constants: Constants, student: "Student", shapes: Shapes) -> "nn.Module | None":
    """Build the distillation heads: for each teacher maps to its widths, g, and AFD's W, W' and f.

    Terms without a weight get no heads. Returns None if no weighted term needs any.
    """
    from student.models.heads import PerTeacher

    per_teacher = [
        _teacher_heads(constants, student, of_teacher(shapes, k)) for k in range(num_teachers(shapes))
    ]
    modules = [module for module in per_teacher if module is not None]
    return PerTeacher(modules) if len(modules) > 1 else modules[0] if modules else None


def _teacher_heads(constants: Constants, student: "Student", shapes: Shapes) -> "nn.Module | None":
    """Build the heads for one teacher, or return None if no weighted term needs any."""
    from student.models.heads import Chain, Fusion, HiddenSpace, TeacherSpace
    from teachercache.core.progress import say

    modules: list[nn.Module] = []
    learns_g = bool(constants.icl or constants.cross)
    if learns_g or constants.fd or constants.mfd or constants.gd or constants.afd:
        widths = shapes["image_emb"][-1], shapes["text_emb"][-1]
        modules.append(TeacherSpace(cast(clip.PairStudent, student).widths, widths, scale=learns_g))
        for name, weight in (("fd", constants.fd), ("mfd", constants.mfd)):
            if weight:
                say(
                    f"{name}={weight:g} over {widths[0]} dimensions equals {2 * weight / widths[0]:.3g} "
                    "(1 - cos) per modality"
                )
        if constants.afd:
            modules.append(Fusion(widths))
    if constants.hidden:
        pairs = block_pairs(constants)
        teacher_widths = {field: shapes[field][-1] for _, field in pairs}
        modules.append(HiddenSpace(pairs, cast("TwoTower", student).block_widths, teacher_widths))
    return Chain(modules) if len(modules) > 1 else modules[0] if modules else None


def loss(outputs: Outputs, fields: Batch, constants: Constants, progress: Progress) -> tuple[Terms, Notes]:
    """Compute the weighted terms over the global batch.

    With several teachers, each term is the mean over them. The notes are the learnable scales, `cos_image`,
    the mean cosine of V' and V_T, and `gd_share`.
    """
    per_teacher = [
        _teacher_terms(of_teacher(outputs, k), of_teacher(fields, k), constants)
        for k in range(num_teachers(fields))
    ]
    terms, notes = (
        {name: sum(values[name] for values in of_teachers) / len(of_teachers) for name in of_teachers[0]}
        for of_teachers in zip(*per_teacher, strict=True)
    )
    if "gd" in terms:
        notes["gd_share"] = (terms["gd"] / sum(terms.values())).detach()
    return terms, notes


def _teacher_terms(student: Outputs, batch: Batch, constants: Constants) -> tuple[Terms, Notes]:
    """Compute the weighted terms and notes of one teacher; tensors that no term needs may be missing."""
    from student import losses

    V, S = _unit(student, "image", "text")
    V_, S_ = _unit(student, "image_in_teacher_space", "text_in_teacher_space")
    V_T, S_T = _unit(batch, "image_emb", "text_emb")
    (V_masked,) = _unit(student, "masked_image_in_teacher_space")
    A, B = _unit(student, "image_fused", "text_fused")
    a: Any = student["scale"]
    g: Any = student.get("icl_scale")
    f: Any = student.get("fused_scale")
    a_T: Any = batch["logit_scale"].exp() if "logit_scale" in batch else None
    # Task and CRD share their matrix products
    task_and_crd = functools.cache(lambda: losses.clip_crd_losses(V, S, a, V_T, S_T, a_T))
    terms: dict[str, Callable[[], Tensor]] = {
        "task": lambda: task_and_crd()[0] if constants.crd else losses.clip_loss(V, S, a),
        "crd": lambda: task_and_crd()[1] if constants.task else losses.crd_loss(V, S, a, V_T, S_T, a_T),
        "fd": lambda: losses.fd_loss(V_, S_, V_T, S_T),
        "icl": lambda: losses.icl_loss(V_, S_, V_T, S_T, g),
        "mfd": lambda: losses.fd_loss(V_masked, S_, V_T, S_T),
        "gd": lambda: losses.gd_loss(V_, S_, a, V_T, S_T, a_T),
        "afd": lambda: losses.clip_loss(A, B, f),
        "cross": lambda: losses.cross_kd_loss(V_, S_, g, V_T, S_T, a_T),
        "hidden": lambda: _hidden(student, batch, block_pairs(constants)),
    }
    weights = {name: getattr(constants, name) for name in terms}
    weighted = {name: weights[name] * term() for name, term in terms.items() if weights[name]}
    notes = {"scale": a, "icl_scale": g, "fused_scale": f}
    notes |= {"cos_image": (V_ * V_T).sum(1).mean()} if V_ is not None else {}
    return weighted, {name: value.detach() for name, value in notes.items() if value is not None}


def _hidden(student: Outputs, batch: Batch, pairs: list[tuple[str, str]]) -> "Tensor":
    """Compute the mean over the pairs of blocks of each tower, summed over the towers as in FD."""
    from student.losses import hidden_loss

    means: list[Tensor] = []
    for tower in ("image", "text"):
        losses = [
            hidden_loss(*_unit(student, f"{block}:{field}"), *_unit(batch, field))
            for block, field in pairs
            if block.startswith(tower)
        ]
        if losses:
            means.append(sum(losses[1:], losses[0]) / len(losses))
    return sum(means[1:], means[0])


def _unit(values: Batch, *names: str) -> list[Any]:
    """Return the named tensors with normalized rows; None for a name that is missing."""
    from torch.nn.functional import normalize

    return [normalize(values[name].float()) if name in values else None for name in names]


CLIP_KD = Recipe(
    name="clip_kd",
    paper="CLIP-KD: An Empirical Study of CLIP Model Distillation (2024)",
    doc="relations, features and cross-modal contrast of a cached CLIP teacher",
    constants=Constants(),
    rows=rows,
    student=build,
    distill_heads=heads,
    loss=loss,
    teacher_fields=teacher_fields,
)
