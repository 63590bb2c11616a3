"""Distill a text-to-image diffusion model into CLIP's image encoder (SDS-CLIP, 2024).

f, g are the student's image and text encoders, x is a picture, c its caption, v(x) its latent, and eps_theta
the frozen UNet of the teacher. h_w is a linear map without bias from the image embedding to the UNet's input:
512 x 16,384 with ViT-B/16 and Stable Diffusion (the paper's "about 8M" parameters).

    Eq. 1  d(x, c) = E_{t, eps} ||eps_theta(z_t, t, c) - eps||^2,
           z_t = sqrt(abar_t) v(x) + sqrt(1 - abar_t) eps
    Eq. 3  L_SDS   = E_{t, eps} ||eps_theta(z_t, t, c) - eps||^2,
           z_t = sqrt(abar_t) h_w(f(x)) + sqrt(1 - abar_t) eps
    Eq. 4  L = L_CLIP + lambda L_SDS
    Eq. 5  minimized over w and the LayerNorms of f and g; the gradient passes through the frozen UNet
    Eq. 6  L = L_CLIP + lambda ||h_w(f(x)) - I(x, c)||^2,  I(x, c) the UNet's output for v(x)
           (appendix A.2: no gain)

    sds_weight  lambda
    objective   score: Eq. 3; features: Eq. 6 with I from the cache; none: L_CLIP alone, a baseline.
                The paper's vanilla CLIP is the model of `init`
    train       layernorm; or all: full fine-tuning, a baseline
    grad        full: the paper's gradient; sds: without the UNet's Jacobian, as in DreamFusion. The loss has
                the same value, its gradient with respect to h_w(f(x)) is 2 sqrt(abar_t) (eps_theta - eps)

Free choices, where the paper gives no detail:

- ||.||^2 is the mean over elements, with lambda = 0.001. If the paper's norm is the sum over 4 x 64 x 64
  elements, its lambda is 16.4 here.
- Each row draws one eps and one t per epoch, t uniform from t_min to t_max - 1.
- h_w reads the normalized embedding of CLIP's joint space (unit_embedding=false: the raw one). It is
  initialized like nn.Linear (latent_init=zero: with zeros; unit: so that latents have unit variance).
- layernorm freezes logit_scale too, and trains BatchNorm's weights if a tower has no LayerNorm (RN50);
  BatchNorm's statistics stay those of the model that is tuned.
- AdamW has no weight decay; its schedule is warm-up and cosine.
- L_CLIP is the mean of the two directions, as in Eq. 7 of the appendix.

The text states c are read from the cache, and only the UNet is loaded. It computes in bfloat16 if the device
supports it, and processes `unet_rows` rows at a time, forward and backward, before the next ones: this bounds
its memory, and nothing is computed twice. checkpoint=true keeps fewer activations; --dry-run prints the
memory that is needed. --micro-batch also bounds the student's memory, at the cost of another forward pass of
both models.

    python -m scripts.datasets.scenes --out data/scene-pairs
    tc build --teacher sd-tiny --data data/scene-pairs
    student train --recipe sds_clip --set init=runs/NAME          # the run or exported folder to fine-tune
    student train --recipe sds_clip --set init=FOLDER --set objective=none

Eq. 6 needs the UNet's outputs in the cache:

    tc build --teacher sd-tiny --outputs text_states,latents,unet_features:100+out --data data/scene-pairs
    student train --recipe sds_clip --set init=FOLDER --set objective=features
"""

import dataclasses
from typing import TYPE_CHECKING, Literal, cast

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
from teachercache.core.ranges import Count, Name, Number, Weight, check_record

if TYPE_CHECKING:
    from torch import nn

    from student.contract import Student
    from teachercache.cache.store import Cache
    from teachercache.teachers.diffusion.model import Diffusion
    from teachercache.teachers.teacher import Teacher


@dataclasses.dataclass(frozen=True)
class Constants:
    """The paper's constants, the switches of its tables, how the UNet is run, and the student model."""

    sds_weight: Weight = 0.001  # lambda of Eq. 4 and 6
    objective: Literal["score", "features", "none"] = "score"
    train: Literal["layernorm", "all"] = "layernorm"
    grad: Literal["full", "sds"] = "full"
    t_min: Count = 0
    t_max: Number = 1000  # exclusive
    latent_init: Literal["default", "zero", "unit"] = "default"  # initialization of h_w; free choice
    unit_embedding: bool = True  # h_w reads unit embeddings; free choice
    unet_rows: Count = 16  # rows that the UNet processes at a time, 0 for all
    checkpoint: bool = False  # recompute the UNet's inner activations instead of keeping them
    unet_precision: Literal["auto", "float32", "bfloat16"] = "auto"
    model: Name = "vit-tiny-long"
    init: str = ""  # a run folder or exported folder to start from

    def __post_init__(self) -> None:
        if not self.t_min < self.t_max:
            raise UserError(
                f"--set t_min={self.t_min} and t_max={self.t_max}: 0 <= t_min < t_max is expected"
            )


def objective(constants: Constants) -> str:
    """Return the objective whose term is added to L_CLIP; "none" if the weight is 0."""
    return constants.objective if constants.sds_weight else "none"


def teacher_fields(constants: Constants) -> tuple[str, ...]:
    """Return the cached fields of the objective: text states (Eq. 3), or the UNet's outputs I (Eq. 6)."""
    check_record(constants)
    return {"score": ("text_states",), "features": ("unet_feature",), "none": ()}[objective(constants)]


def build(constants: Constants, setting: Setting) -> "Student":
    """Build the student model, and freeze the parameters that are not trained.

    Raises:
        UserError: The model has no LayerNorm to train.
    """
    from teachercache.core.progress import say

    student = clip.build_by_name(constants.model, constants.init)
    if constants.train == "layernorm":
        freeze_all_but_norms(cast("nn.Module", student))
        if not constants.init:
            say(
                "WARNING: only the LayerNorms of a random model will be trained: pass --set init=FOLDER, or "
                "--set train=all"
            )
    return student


def freeze_all_but_norms(student: "nn.Module") -> None:
    """Freeze all parameters except those of LayerNorm and BatchNorm layers.

    Raises:
        UserError: There are no such layers.
    """
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


def heads(constants: Constants, student: "Student", shapes: Shapes) -> "nn.Module | None":
    """Build h_w, which maps to the UNet's input (Eq. 3) or output (Eq. 6); None if neither is needed."""
    from student.models.heads import LatentSpace

    field = {"score": "latent", "features": "unet_feature", "none": ""}[objective(constants)]
    if not field:
        return None
    if field not in shapes:
        raise UserError(
            f"the cache has no field {field}, whose shape h_w needs: build another cache with `tc build "
            "--outputs text_states,latents`"
        )
    width, _ = cast(clip.PairStudent, student).widths
    return LatentSpace(width, shapes[field], start=constants.latent_init, unit=constants.unit_embedding)


def sample_noise(constants: Constants, shapes: Shapes) -> dict[str, Noise]:
    """Return how a row's `t` and `noise` (eps) are drawn; {} without Eq. 3."""
    import numpy as np

    if objective(constants) != "score":
        return {}
    return {
        "t": lambda random: np.int64(random.integers(constants.t_min, constants.t_max)),
        "noise": lambda random: random.standard_normal(shapes["latent"], np.float32),
    }


def load(cache: "Cache", constants: Constants, device: str) -> "Teacher | None":
    """Load the teacher's UNet onto the device, or return None without Eq. 3."""
    if objective(constants) != "score":
        return None
    from student.models.frozen_unet import load_unet

    teacher = load_unet(cache, device, precision=constants.unet_precision, checkpoint=constants.checkpoint)
    num_steps = len(cast("Diffusion", teacher.module).alphas_cumprod)
    if constants.t_max > num_steps:
        raise UserError(f"--set t_max={constants.t_max}: {teacher.spec.name} has {num_steps} time steps")
    return teacher


def call(teacher: "Teacher", outputs: Outputs, fields: Batch, constants: Constants) -> Outputs:
    """Compute Eq. 3 in the UNet's precision.

    Args:
        teacher: A diffusion model.
        outputs: `latent`, h_w(f(x)) [n, channels, height, width].
        fields: `noise` (eps) in the same shape, `t` [n], `text_states` (c) [n, length, dim].
        constants: The kind of gradient, and the rows that the UNet processes at a time.

    Returns:
        `error` [n], the mean over elements of each row.
    """
    import torch

    from student.models.frozen_unet import diffusion_errors

    latent, noise = outputs["latent"], fields["noise"]
    latent = latent if latent.dtype == torch.float64 else latent.float()
    return {
        "error": diffusion_errors(
            cast("Diffusion", teacher.module),
            latent,
            noise.to(latent.dtype),
            fields["t"],
            fields["text_states"],
            full=constants.grad == "full",
            micro=constants.unet_rows,
        )
    }


def memory(teacher: "Teacher", rows: int, constants: Constants) -> str:
    """Return a sentence about the UNet's memory in a step of `rows` rows."""
    from student.models.frozen_unet import memory_words

    return memory_words(teacher, min(rows, constants.unet_rows or rows))


def loss(outputs: Outputs, fields: Batch, constants: Constants, progress: Progress) -> tuple[Terms, Notes]:
    """Compute Eq. 4, or Eq. 6 for objective=features: L_CLIP over the global batch, plus the weighted term.

    Returns:
        The terms `task` and `sds` or `features`; the notes `scale` and for Eq. 3 `error`, the mean of its
        errors.
    """
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
    paper="Distilling Knowledge from Text-to-Image Generative Models Improves Visio-Linguistic Reasoning "
    "in CLIP (2024)",
    doc="score distillation from a diffusion UNet in the loop, for spatial relations and attribute binding",
    constants=Constants(),
    student=build,
    distill_heads=heads,
    loss=loss,
    teacher_fields=teacher_fields,
    loss_fields=("text_states", "unet_feature", "t", "noise"),
    per_row=frozenset({"latent", "text_states", "unet_feature", "t", "noise"}),
    data="data/scene-pairs",
    teacher="sd-tiny",
    teacher_outputs={"unet_features": "text_states,latents,unet_features:100+out"},
    gradient_teacher=GradientTeacher(load, call, memory),
    sample_noise=sample_noise,
    optim=Optim(lr=5e-5, weight_decay=0.0),
    batch=32,
)
