"""clip_kd: CLIP-KD, an empirical study of CLIP model distillation (Yang et al., CVPR 2024).

V, S student, V_T, S_T teacher embeddings, rows normalised, N of them; a_S, a_T their scales; g, f learnable scales,
exp of parameters that start and are clamped as CLIP's; V' = V where the widths agree, else norm(linear(raw student
feature)). Task loss and CRD use V, S themselves. H are outputs of inner blocks, H' in the teacher's width.

    Task    1/2 [CE(a_S V S^T, I) + CE(a_S S V^T, I)]
    CRD     1/2 [KL(sm(a_T V_T S_T^T) || sm(a_S V S^T)) + KL(sm(a_T S_T V_T^T) || sm(a_S S V^T))]
    FD      mean over pairs and dims of (V' - V_T)^2, plus the same for text
    ICL     1/2 [CE(g V' S_T^T, I) + CE(g S' V_T^T, I)]
    MFD     FD, V' of pictures with a random share `mask_ratio` of their patches left out
    GD      mean over pairs of |G_V,T - G_V|^2, plus the same for text; P = sm(a V' S'^T), Q = sm(a S' V'^T),
            G_V = a/2N [(P - I) S' + (Q - I)^T S'], G_S = a/2N [(Q - I) V' + (P - I)^T V']     (appendix Eq. 1-7)
    AFD     1/2 [CE(f A B^T, I) + CE(f B A^T, I)],  A = norm(W [V'; V_T]), B = norm(W' [S'; S_T])
    cross   1/2 [KL(sm(a_T V_T S_T^T) || sm(g V' S_T^T)) + KL(sm(a_T S_T V_T^T) || sm(g S' V_T^T))]
    hidden  mean over pairs, dims and pairs of blocks of (H' - H_T)^2, plus the same for text      (appendix Fig. 2)
    L       task Task + crd CRD + fd FD + icl ICL + mfd MFD + gd GD + afd AFD + cross cross + hidden hidden
            with weights 1, 1, 2000, 1, all others 0

A term of weight 0 is not computed and needs nothing. The paper's ablations: mfd=2000, gd=1e8, afd=1, each alone beside
the task. GD shrinks as (a / N)^2, and the 1e8 fits the released code, which divides by a where Eq. 1 has 1 / tau = a:
there the term is a tenth of the loss of a new student at N = 1024, here about gd=1000 is. `gd_share` says what share it
has. MFD's other terms see whole pictures. AFD's W maps to the teacher's width. hidden is normalised as FD is:

    --set hidden=2000 --set hidden_image=3:7,5:11 --set hidden_text=1:11     student block : teacher block, from 0

Several teachers, `--cache A.zarr,B.zarr`: with ensemble=average every term is the mean over teachers, each with its own
heads. CRD then has the gradient of KL(mean of the teachers' softmaxes || student); its value is higher by the teachers'
disagreement, which is constant. With ensemble=concat they are one teacher: unit rows side by side / sqrt(teachers), a_T
the mean of theirs.

Everything is a function of the cached image_emb, text_emb and logit_scale (hidden: image_hidden_<block>,
text_hidden_<block>): no teacher runs.

    tc build --teacher clip-lite && student train --recipe clip_kd
    tc build --teacher clip-vit-b16 --outputs embeddings,hidden:7+11
"""

import dataclasses
import functools
from typing import TYPE_CHECKING, Any

from student.ensemble import num_teachers, of_teacher
from student.recipe import Batch, Notes, Outputs, Progress, Recipe, Setting, Shapes, Terms
from student.recipes import clip
from student.rows import Pairs
from teachercache.core.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor, nn

    from student.contract import Student


@dataclasses.dataclass(frozen=True)
class Constants:
    """Weights of the terms (section 3 and appendix of the paper) and the student."""

    task: float = 1.0
    crd: float = 1.0
    fd: float = 2000.0  # for a 512-d teacher; 2000 FD = 7.8 (1 - cos) per modality there
    icl: float = 1.0
    mfd: float = 0.0  # 2000 in the ablation
    gd: float = 0.0  # 1e8 in the ablation
    afd: float = 0.0  # 1 in the ablation
    cross: float = 0.0
    hidden: float = 0.0
    mask_ratio: float = 0.75
    hidden_image: str = ""  # STUDENT:TEACHER blocks, several with commas
    hidden_text: str = ""
    ensemble: str = "average"  # or concat; free choice
    model: str = "vit-tiny"
    init: str = ""


def block_pairs(constants: Constants) -> list[tuple[str, str]]:
    """Names of what hidden compares, student's and teacher's: ("image_block_3", "image_hidden_7")."""
    pairs = []
    for tower, words in (("image", constants.hidden_image), ("text", constants.hidden_text)):
        for word in filter(None, words.replace(" ", "").split(",")):
            own, colon, theirs = word.partition(":")
            if not (colon and own.isdecimal() and theirs.isdecimal()):
                raise UserError(
                    f"--set hidden_{tower}={words}: pairs of blocks STUDENT:TEACHER are expected, as 3:7"
                )
            pairs.append((f"{tower}_block_{int(own)}", f"{tower}_hidden_{int(theirs)}"))
    if not pairs:
        raise UserError(
            "--set hidden needs blocks: --set hidden_image=3:7 (student's 3, teacher's 7) or hidden_text"
        )
    return list(dict.fromkeys(pairs))


def rows(constants: Constants) -> Pairs:
    """Pairs, of one teacher or of an ensemble."""
    return Pairs(ensemble=constants.ensemble)


def teacher_fields(constants: Constants) -> tuple[str, ...]:
    """Return the teacher's fields that a term with a weight compares, and those that the student reads."""
    on = any(getattr(constants, name) for name in ("crd", "fd", "icl", "mfd", "gd", "afd", "cross"))
    hidden = dict.fromkeys(field for _, field in block_pairs(constants)) if constants.hidden else ()
    compared = (*(("image_emb", "text_emb") if on else ()), *hidden)
    return tuple(dict.fromkeys((*compared, *clip.student_fields(constants))))


def build(constants: Constants, setting: Setting) -> "Student":
    """Build the student by name; its forward also encodes masked pictures and returns blocks that a term compares."""
    from student.models.two_tower.model import add_block_outputs, add_masked_output
    from teachercache.core.progress import say

    for setting, weight in (("mask_ratio", "mfd"), ("hidden_image", "hidden"), ("hidden_text", "hidden")):
        if getattr(constants, setting) != getattr(Constants, setting) and not getattr(constants, weight):
            say(f"WARNING: --set {setting} does nothing while {weight}=0")
    student = clip.build_by_name(constants.model, constants.init)
    if constants.mfd:
        add_masked_output(student, constants.mask_ratio)
    if constants.hidden:
        add_block_outputs(student, [block for block, _ in block_pairs(constants)])
    return student


def heads(constants: Constants, student: Any, shapes: Shapes) -> "nn.Module | None":
    """Build what only distillation trains, per teacher: maps to its widths if they differ, g, AFD's W, W' and f."""
    from student.models.heads import PerTeacher

    each = [_heads(constants, student, of_teacher(shapes, k)) for k in range(num_teachers(shapes))]
    modules = [module for module in each if module is not None]
    return PerTeacher(modules) if len(modules) > 1 else modules[0] if modules else None


def _heads(constants: Constants, student: Any, shapes: Shapes) -> "nn.Module | None":
    from student.models.heads import Chain, Fusion, HiddenSpace, TeacherSpace
    from teachercache.core.progress import say

    parts, interactive = [], constants.icl or constants.cross
    if interactive or constants.fd or constants.mfd or constants.gd or constants.afd:
        widths = shapes["image_emb"][-1], shapes["text_emb"][-1]
        parts.append(TeacherSpace(student.widths, widths, scale=bool(interactive)))
        for name in ("fd", "mfd"):
            if weight := getattr(constants, name):
                say(
                    f"{name}={weight:g} over {widths[0]} dimensions weighs {2 * weight / widths[0]:.3g} (1 - cos) "
                    "per modality"
                )
        parts += [Fusion(widths)] if constants.afd else []
    if constants.hidden:
        pairs = block_pairs(constants)
        parts.append(
            HiddenSpace(pairs, student.block_widths, {field: shapes[field][-1] for _, field in pairs})
        )
    return Chain(parts) if len(parts) > 1 else parts[0] if parts else None


def loss(outputs: Outputs, fields: Batch, constants: Constants, progress: Progress) -> tuple[Terms, Notes]:
    """Compute every term that has a weight, over the global batch; of several teachers the mean."""
    each = [
        _one_teacher(of_teacher(outputs, k), of_teacher(fields, k), constants)
        for k in range(num_teachers(fields))
    ]
    terms, notes = (
        {name: sum(values[name] for values in of_teachers) / len(of_teachers) for name in of_teachers[0]}
        for of_teachers in zip(*each, strict=True)
    )
    if "gd" in terms:
        notes["gd_share"] = (terms["gd"] / sum(terms.values())).detach()
    return terms, notes


def _one_teacher(student: Outputs, batch: Batch, constants: Constants) -> tuple[Terms, Notes]:
    """Return weighted terms and notes; tensors that no term needs are missing, and None here."""
    from student import losses

    V, S = _unit(student, "image", "text")
    V_, S_ = _unit(student, "image_in_teacher_space", "text_in_teacher_space")
    V_T, S_T = _unit(batch, "image_emb", "text_emb")
    (V_masked,) = _unit(student, "masked_image_in_teacher_space")
    A, B = _unit(student, "image_fused", "text_fused")
    a, g, f = student["scale"], student.get("icl_scale"), student.get("fused_scale")
    a_T = batch["logit_scale"].exp() if "logit_scale" in batch else None
    both = functools.cache(lambda: losses.clip_crd_losses(V, S, a, V_T, S_T, a_T))
    terms = {
        "task": lambda: both()[0] if constants.crd else losses.clip_loss(V, S, a),
        "crd": lambda: both()[1] if constants.task else losses.crd_loss(V, S, a, V_T, S_T, a_T),
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
    """Return the mean over the pairs of blocks of each tower; the towers are added, as FD adds image and text."""
    from student.losses import hidden_loss

    total = 0
    for tower in ("image", "text"):
        found = [
            hidden_loss(*_unit(student, f"{block}:{field}"), *_unit(batch, field))
            for block, field in pairs
            if block.startswith(tower)
        ]
        total = total + sum(found) / max(1, len(found))
    return total


def _unit(values: Batch, *names: str) -> "list[Any]":
    """Return the rows of these names, normalized; None for a name that is missing."""
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
