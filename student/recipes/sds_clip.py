"""sds_clip: SDS-CLIP, distilling a text-to-image diffusion model into CLIP's image encoder (2024).

f, g the student's image and text encoder, x a picture, c its caption, v(x) its latent, eps_theta the UNet of the
teacher, frozen; h_w a linear map without a bias from the image embedding to the UNet's input, 512 x 16,384 with
ViT-B/16 and Stable Diffusion (the paper's "about 8M" parameters).

    Eq. 1  d(x, c) = E_{t, eps} ||eps_theta(z_t, t, c) - eps||^2,  z_t = sqrt(abar_t) v(x) + sqrt(1 - abar_t) eps
    Eq. 3  L_SDS = E_{t, eps} ||eps_theta(z_t, t, c) - eps||^2,    z_t = sqrt(abar_t) h_w(f(x)) + sqrt(1 - abar_t) eps
    Eq. 4  L = L_CLIP + lam L_SDS
    Eq. 5  minimised over the LayerNorms of f and g, and w; the gradient passes through the UNet, which stays as it is
    Eq. 6  L = L_CLIP + lam ||h_w(f(x)) - I(x, c)||^2,  I(x, c) what the UNet says of v(x)    (appendix A.2: no help)

    objective  score: Eq. 3; features: Eq. 6, I from the cache; none: L_CLIP alone, a baseline. Vanilla CLIP is `init`
    train      layernorm, or all: full fine-tuning, a baseline
    grad       full: the paper's; sds: the UNet's Jacobian left out, as DreamFusion does, 2 sqrt(abar_t) (eps_theta -
               eps) in the place of the gradient with respect to h_w(f(x)), under the same value

Free choices, where the paper is silent. ||.||^2 is the mean over elements, under which lam = 0.001; for the sum over
4 x 64 x 64 of them that is 16.4. One t, uniform in t_min to t_max - 1, and one eps for each row and epoch. h_w sees
the embedding of CLIP's joint space, normalised (unit=false: raw), and starts as nn.Linear does (hw_init=zero, or
unit: latents of unit variance). layernorm leaves logit_scale frozen, and counts BatchNorm's weights in where a tower
has no LayerNorm (RN50). AdamW without weight decay, warm-up and cosine. L_CLIP is the mean of the two directions,
which is what the appendix's Eq. 7 says.

The text states c are read from the cache; only the UNet is loaded. It computes in bfloat16 where the device does,
`micro` rows at a time: forward and backward of these, then of the next, so that their number bounds its memory and
nothing is computed twice. checkpoint=true keeps less of each; --dry-run says how much all of it is. --micro-batch cuts
batches besides, which bounds the student's memory and costs another forward of both.

    python -m scripts.datasets.scenes --out data/scene-pairs && tc build --teacher sd-tiny --data data/scene-pairs
    student train --recipe sds_clip --set init=runs/NAME          # a run or an exported folder to fine-tune
    student train --recipe sds_clip --set init=FOLDER --set objective=none
    tc build --teacher sd-tiny --outputs text_states,latents,unet_features:100+out --data data/scene-pairs    # Eq. 6
"""

import dataclasses

from student.recipe import Live, Now, Optim, Recipe
from student.recipes import clip
from teachercache.core.errors import UserError

CHOICES = {
    "objective": ("score", "features", "none"),
    "train": ("layernorm", "all"),
    "grad": ("full", "sds"),
    "hw_init": ("default", "zero", "unit"),
}


@dataclasses.dataclass(frozen=True)
class Constants:
    """The paper's constants, what is switched in its tables, and how the UNet is run."""

    lam: float = 0.001  # lambda of Eq. 4 and 6
    objective: str = "score"  # or features, none
    train: str = "layernorm"  # or all
    grad: str = "full"  # or sds
    t_min: int = 0
    t_max: int = 1000  # t is below it
    hw_init: str = "default"  # or zero, unit; free choice
    unit: bool = True  # h_w sees unit embeddings; free choice
    micro: int = 16  # rows that the UNet sees at a time, 0 for all
    checkpoint: bool = False  # compute the UNet's inner activations again instead of keeping them
    unet_precision: str = "auto"  # or float32, bfloat16
    model: str = "vit-tiny-long"
    init: str = ""  # a run or an exported folder to start from


def objective(constants: Constants) -> str:
    """What is added to L_CLIP; nothing where its weight is 0."""
    for name, choices in CHOICES.items():
        if getattr(constants, name) not in choices:
            raise UserError(f"--set {name}={getattr(constants, name)}: choose from {', '.join(choices)}")
    return constants.objective if constants.lam else "none"


def reads(constants: Constants) -> tuple[str, ...]:
    """Text states for the UNet, or what it said of the pictures' own latents."""
    return {"score": ("text_states",), "features": ("unet_feature",), "none": ()}[objective(constants)]


def build(constants: Constants):
    """The student by name; what does not train is frozen, and so in no optimizer."""
    from teachercache.core.progress import say

    if not 0 <= constants.t_min < constants.t_max:
        raise UserError(
            f"--set t_min={constants.t_min} and t_max={constants.t_max}: 0 <= t_min < t_max is expected"
        )
    if constants.micro < 0:
        raise UserError(f"--set micro={constants.micro}: a number of rows is expected, 0 for all")
    student = clip.build(constants)
    if constants.train == "layernorm":
        keep_norms(student)
        if not constants.init:
            say(
                "WARNING: only the LayerNorms of a random model will train: pass --set init=FOLDER, or train=all"
            )
    return student


def keep_norms(student) -> None:
    """Freeze all parameters but those of normalisation layers."""
    from torch import nn

    norms = [
        module
        for module in student.modules()
        if isinstance(module, nn.LayerNorm | nn.modules.batchnorm._BatchNorm)
    ]
    kept = {id(parameter) for module in norms for parameter in module.parameters()}
    if not kept:
        raise UserError(
            f"{type(student).__name__} has no LayerNorm: choose another model, or --set train=all"
        )
    for parameter in student.parameters():
        parameter.requires_grad_(id(parameter) in kept)


def heads(constants: Constants, student, shapes: dict):
    """h_w, to what the UNet reads, or to what it said."""
    from student.models.heads import LatentSpace

    field = {"score": "latent", "features": "unet_feature", "none": ""}[objective(constants)]
    if not field:
        return None
    if field not in shapes:
        raise UserError(
            f"the cache has no field {field}, whose shape h_w needs: build another with `tc build "
            "--outputs text_states,latents`"
        )
    return LatentSpace(student.widths[0], shapes[field], start=constants.hw_init, unit=constants.unit)


def draw(random, constants: Constants, shapes: dict) -> dict:
    """A row's t and eps, where the UNet is asked."""
    import numpy as np

    if objective(constants) != "score":
        return {}
    t = np.int64(random.integers(constants.t_min, constants.t_max))
    return {"t": t, "noise": random.standard_normal(shapes["latent"], np.float32)}


def load(cache, constants: Constants, device: str):
    """The UNet, where it is asked."""
    if objective(constants) != "score":
        return None
    from student.models.frozen_unet import load_unet

    teacher = load_unet(cache, device, precision=constants.unet_precision, checkpoint=constants.checkpoint)
    known = len(teacher.module.alphas_cumprod)
    if constants.t_max > known:
        raise UserError(f"--set t_max={constants.t_max}: {teacher.spec.name} has {known} time steps")
    return teacher


def call(teacher, outputs: dict, fields: dict, constants: Constants) -> dict:
    """Eq. 3 of each row, `error` [n], outside of the student's precision."""
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
            micro=constants.micro,
        )
    }


def memory(teacher, rows: int, constants: Constants) -> str:
    """What the UNet needs in a step of so many rows."""
    from student.models.frozen_unet import memory_words

    return memory_words(teacher, min(rows, constants.micro or rows))


def loss(student: dict, batch: dict, constants: Constants, now: Now) -> tuple[dict, dict]:
    """L_CLIP over the global batch and its regulariser."""
    from student.losses import diffusion_loss

    terms, notes = clip.loss(student, batch, constants, now)
    if "error" in student:
        terms["sds"] = constants.lam * student["error"].mean()
        notes["error"] = student["error"].detach().mean()
    elif "latent" in student:
        terms["features"] = constants.lam * diffusion_loss(student["latent"], batch["unet_feature"]).mean()
    return terms, notes


SDS_CLIP = Recipe(
    name="sds_clip",
    paper="Distilling Knowledge from Text-to-Image Generative Models Improves Visio-Linguistic Reasoning in CLIP "
    "(2024)",
    doc="the score of a live diffusion UNet, for who stands where and which attribute is whose",
    constants=Constants(),
    build=build,
    heads=heads,
    loss=loss,
    reads=reads,
    given=("text_states", "unet_feature", "t", "noise"),
    data="data/scene-pairs",
    teacher="sd-tiny",
    live=Live(load, call, memory),
    draw=draw,
    across=("image", "text", "error"),
    optim=Optim(lr=5e-5, weight_decay=0.0),
    batch=32,
)
