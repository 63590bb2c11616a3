"""sds_clip: SDS-CLIP, distilling a text-to-image diffusion model into CLIP's image encoder (2024).

f, g the student's image and text encoder, x a picture, c its caption, v(x) its latent, eps_theta the UNet of the
teacher, frozen; h_w a linear map without a bias from the image embedding to the UNet's input, 512 x 16,384 with
ViT-B/16 and Stable Diffusion (the paper's "about 8M" parameters).

    Eq. 1  d(x, c) = E_{t, eps} ||eps_theta(z_t, t, c) - eps||^2,  z_t = sqrt(abar_t) v(x) + sqrt(1 - abar_t) eps
    Eq. 3  L_SDS = E_{t, eps} ||eps_theta(z_t, t, c) - eps||^2,    z_t = sqrt(abar_t) h_w(f(x)) + sqrt(1 - abar_t) eps
    Eq. 4  L = L_CLIP + lambda L_SDS
    Eq. 5  minimized over the LayerNorms of f and g, and w; the gradient passes through the UNet, which is frozen
    Eq. 6  L = L_CLIP + lambda ||h_w(f(x)) - I(x, c)||^2,  I(x, c) the UNet's output for v(x)    (appendix A.2: no help)

    sds_weight  lambda
    objective   score: Eq. 3; features: Eq. 6, I from the cache; none: L_CLIP alone, a baseline. Vanilla CLIP is `init`
    train       layernorm, or all: full fine-tuning, a baseline
    grad        full: the paper's; sds: without the UNet's Jacobian, as DreamFusion does: 2 sqrt(abar_t) (eps_theta -
                eps) replaces the gradient with respect to h_w(f(x)), under the same value

Free choices, where the paper is silent. ||.||^2 is the mean over elements, with which lambda = 0.001; for the sum over
4 x 64 x 64 elements that is 16.4. One t, uniform in t_min to t_max - 1, and one eps for each row and epoch. h_w reads
the normalized embedding of CLIP's joint space (unit_embedding=false: raw), and starts as nn.Linear does
(latent_init=zero, or unit: latents of unit variance). layernorm leaves logit_scale frozen, and includes BatchNorm's
weights if a tower has no LayerNorm (RN50). AdamW without weight decay, warm-up and cosine. L_CLIP is the mean of the
two directions, as in the appendix's Eq. 7.

The text states c are read from the cache; only the UNet is loaded. It computes in bfloat16 where the device does,
`unet_rows` rows at a time: forward and backward of these, then of the next, so that their number bounds its memory and
nothing is computed twice. checkpoint=true keeps less of each; --dry-run prints the memory it needs. --micro-batch cuts
batches besides, which bounds the student's memory and costs another forward of both.

    python -m scripts.datasets.scenes --out data/scene-pairs && tc build --teacher sd-tiny --data data/scene-pairs
    student train --recipe sds_clip --set init=runs/NAME          # a run or an exported folder to fine-tune
    student train --recipe sds_clip --set init=FOLDER --set objective=none
    tc build --teacher sd-tiny --outputs text_states,latents,unet_features:100+out --data data/scene-pairs    # Eq. 6
"""

import dataclasses
from typing import TYPE_CHECKING, Any

from student.recipe import (
    Batch,
    GradientTeacher,
    Noise,
    Notes,
    Optim,
    Outputs,
    Progress,
    Recipe,
    Setting,
    Shapes,
    Terms,
)
from student.recipes import clip
from teachercache.core.errors import UserError

if TYPE_CHECKING:
    from torch import nn

    from student.contract import Student
    from teachercache.cache.store import Cache
    from teachercache.teachers.teacher import Teacher

CHOICES = {
    "objective": ("score", "features", "none"),
    "train": ("layernorm", "all"),
    "grad": ("full", "sds"),
    "latent_init": ("default", "zero", "unit"),
}


@dataclasses.dataclass(frozen=True)
class Constants:
    """The paper's constants, the switches of its tables, and how the UNet is run."""

    sds_weight: float = 0.001  # lambda of Eq. 4 and 6
    objective: str = "score"  # or features, none
    train: str = "layernorm"  # or all
    grad: str = "full"  # or sds
    t_min: int = 0
    t_max: int = 1000  # t is below it
    latent_init: str = "default"  # start of h_w: or zero, unit; free choice
    unit_embedding: bool = True  # h_w reads unit embeddings; free choice
    unet_rows: int = 16  # rows that the UNet computes at a time, 0 for all
    checkpoint: bool = False  # recompute the UNet's inner activations instead of keeping them
    unet_precision: str = "auto"  # or float32, bfloat16
    model: str = "vit-tiny-long"
    init: str = ""  # a run or an exported folder to start from


def objective(constants: Constants) -> str:
    """Return which term is added to L_CLIP; "none" if its weight is 0."""
    for name, choices in CHOICES.items():
        if getattr(constants, name) not in choices:
            raise UserError(f"--set {name}={getattr(constants, name)}: choose from {', '.join(choices)}")
    return constants.objective if constants.sds_weight else "none"


def teacher_fields(constants: Constants) -> tuple[str, ...]:
    """Return text states for the UNet, or its outputs for the pictures' own latents."""
    return {"score": ("text_states",), "features": ("unet_feature",), "none": ()}[objective(constants)]


def build(constants: Constants, setting: Setting) -> "Student":
    """Build the student by name; parameters that do not train are frozen, and so in no optimizer."""
    from teachercache.core.progress import say

    if not 0 <= constants.t_min < constants.t_max:
        raise UserError(
            f"--set t_min={constants.t_min} and t_max={constants.t_max}: 0 <= t_min < t_max is expected"
        )
    if constants.unet_rows < 0:
        raise UserError(f"--set unet_rows={constants.unet_rows}: a number of rows is expected, 0 for all")
    student = clip.build_by_name(constants.model, constants.init)
    if constants.train == "layernorm":
        freeze_all_but_norms(student)
        if not constants.init:
            say(
                "WARNING: only the LayerNorms of a random model will train: pass --set init=FOLDER, or train=all"
            )
    return student


def freeze_all_but_norms(student: Any) -> None:
    """Freeze all parameters except those of normalization layers."""
    from torch import nn

    norms = [
        module
        for module in student.modules()
        if isinstance(module, nn.LayerNorm | nn.modules.batchnorm._BatchNorm)
    ]
    trained = {id(parameter) for module in norms for parameter in module.parameters()}
    if not trained:
        raise UserError(
            f"{type(student).__name__} has no LayerNorm: choose another model, or --set train=all"
        )
    for parameter in student.parameters():
        parameter.requires_grad_(id(parameter) in trained)


def heads(constants: Constants, student: Any, shapes: Shapes) -> "nn.Module | None":
    """Build h_w, to the UNet's input or to its outputs."""
    from student.models.heads import LatentSpace

    field = {"score": "latent", "features": "unet_feature", "none": ""}[objective(constants)]
    if not field:
        return None
    if field not in shapes:
        raise UserError(
            f"the cache has no field {field}, whose shape h_w needs: build another with `tc build "
            "--outputs text_states,latents`"
        )
    return LatentSpace(
        student.widths[0], shapes[field], start=constants.latent_init, unit=constants.unit_embedding
    )


def sample_noise(constants: Constants, shapes: Shapes) -> dict[str, Noise]:
    """Return how a row's t and eps are drawn, if the UNet is asked for its score."""
    import numpy as np

    if objective(constants) != "score":
        return {}
    return {
        "t": lambda random: np.int64(random.integers(constants.t_min, constants.t_max)),
        "noise": lambda random: random.standard_normal(shapes["latent"], np.float32),
    }


def load(cache: "Cache", constants: Constants, device: str) -> "Teacher | None":
    """Load the UNet, if its score is minimized."""
    if objective(constants) != "score":
        return None
    from student.models.frozen_unet import load_unet

    teacher = load_unet(cache, device, precision=constants.unet_precision, checkpoint=constants.checkpoint)
    num_steps = len(teacher.module.alphas_cumprod)
    if constants.t_max > num_steps:
        raise UserError(f"--set t_max={constants.t_max}: {teacher.spec.name} has {num_steps} time steps")
    return teacher


def call(teacher: "Teacher", outputs: Outputs, fields: Batch, constants: Constants) -> Outputs:
    """Compute Eq. 3 of each row, `error` [n], in the UNet's precision."""
    import torch

    from student.models.frozen_unet import diffusion_errors

    latent, noise = outputs["latent"], fields["noise"]
    latent = latent if latent.dtype == torch.float64 else latent.float()
    return {
        "error": diffusion_errors(
            teacher.module,
            latent,
            noise.to(latent.dtype),
            fields["t"],
            fields["text_states"],
            full=constants.grad == "full",
            micro=constants.unet_rows,
        )
    }


def memory(teacher: "Teacher", rows: int, constants: Constants) -> str:
    """Return a sentence about the UNet's memory in a step of so many rows."""
    from student.models.frozen_unet import memory_words

    return memory_words(teacher, min(rows, constants.unet_rows or rows))


def loss(outputs: Outputs, fields: Batch, constants: Constants, progress: Progress) -> tuple[Terms, Notes]:
    """Compute L_CLIP over the global batch and its regularizer."""
    from student.losses import diffusion_loss

    terms, notes = clip.contrastive_loss(outputs)
    if "error" in outputs:
        terms["sds"] = constants.sds_weight * outputs["error"].mean()
        notes["error"] = outputs["error"].detach().mean()
    elif "latent" in outputs:
        error = diffusion_loss(outputs["latent"], fields["unet_feature"]).mean()
        terms["features"] = constants.sds_weight * error
    return terms, notes


SDS_CLIP = Recipe(
    name="sds_clip",
    paper="Distilling Knowledge from Text-to-Image Generative Models Improves Visio-Linguistic Reasoning in CLIP "
    "(2024)",
    doc="the score of a live diffusion UNet, for who stands where and which attribute is whose",
    constants=Constants(),
    student=build,
    distill_heads=heads,
    loss=loss,
    teacher_fields=teacher_fields,
    loss_fields=("text_states", "unet_feature", "t", "noise"),
    per_row=frozenset({"latent", "text_states", "unet_feature", "t", "noise"}),
    data="data/scene-pairs",
    teacher="sd-tiny",
    gradient_teacher=GradientTeacher(load, call, memory),
    sample_noise=sample_noise,
    optim=Optim(lr=5e-5, weight_decay=0.0),
    batch=32,
)
