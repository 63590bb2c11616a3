"""Recipes of a user's own, for tests: `--recipe own_recipes:NAME` with `tests` on the path."""

import dataclasses
import os
import signal

import torch
from torch import nn

from student.recipes.clip import CLIP, build
from student.recipes.clip_kd import CLIP_KD, heads, loss
from student.recipes.clip_td import CLIP_TD
from student.recipes.clip_td import build as build_td
from student.recipes.psd import PSD
from student.recipes.sds_clip import SDS_CLIP
from student.recipes.vlkd import VLKD

MICRO = dataclasses.replace(CLIP_KD, constants=dataclasses.replace(CLIP_KD.constants, model="vit-micro"))
STOP_VARIABLE = "OWN_RECIPES_STOP_AT"  # the step in whose loss the process sends itself a SIGTERM


def stopping(inner):
    """A recipe's loss; a stop signal comes while it is computed."""

    def stopping_loss(outputs, fields, constants, progress):
        if os.environ.get(STOP_VARIABLE) == str(progress.step):
            os.kill(os.getpid(), signal.SIGTERM)
        return inner(outputs, fields, constants, progress)

    return stopping_loss


STOPPING = dataclasses.replace(MICRO, name="stopping", loss=stopping(loss))
VLKD_STOPPING = dataclasses.replace(VLKD, name="vlkd_stopping", loss=stopping(VLKD.loss))


class NoisyHeads(nn.Module):
    """Heads that see a tenth of the student's features switched off, another tenth in every step."""

    def __init__(self, inner: nn.Module):
        super().__init__()
        self.inner, self.dropout = inner, nn.Dropout(0.1)

    def forward(self, values):
        return self.inner({name: self.dropout(values[name]) for name in ("image", "text")})


DROPOUT = dataclasses.replace(
    STOPPING, name="dropout", distill_heads=lambda *words: NoisyHeads(heads(*words))
)


def high_build(constants, setting):
    """A student whose logit scale begins just below its limit."""
    student = build(constants, setting)
    student.model.logit_scale.data.fill_(4.59)
    return student


def high_heads(*words):
    """Heads whose ICL scale begins just below its limit."""
    module = heads(*words)
    module.icl_logit_scale.data.fill_(4.59)
    return module


def upward_loss(outputs, fields, constants, progress):
    """clip_kd, and a pull on both scales that is stronger than everything else."""
    terms, notes = loss(outputs, fields, constants, progress)
    pull = -100 * (outputs["scale"].log() + outputs["icl_scale"].log())
    return terms | {"pull": pull}, notes


UPWARD = dataclasses.replace(
    MICRO, name="upward", student=high_build, distill_heads=high_heads, loss=upward_loss
)

BAD_STEP = 3


def bad_gradient_loss(outputs, fields, constants, progress):
    """A finite loss whose gradient is NaN in one step: the square root of zero."""
    terms, notes = loss(outputs, fields, constants, progress)
    if progress.step == BAD_STEP:
        terms["zero"] = torch.sqrt((0 * outputs["image"]).square().sum())
    return terms, notes


BAD_GRADIENT = dataclasses.replace(MICRO, name="bad_gradient", loss=bad_gradient_loss)


def bad_loss(outputs, fields, constants, progress):
    """A loss that is no number in one step."""
    terms, notes = loss(outputs, fields, constants, progress)
    return {**terms, "task": terms["task"] / (0.0 if progress.step == BAD_STEP else 1.0)}, notes


BAD_LOSS = dataclasses.replace(MICRO, name="bad_loss", loss=bad_loss)
PLAIN = dataclasses.replace(
    CLIP, name="plain", constants=dataclasses.replace(CLIP.constants, model="vit-micro")
)
PSD_STOPPING = dataclasses.replace(
    PSD,
    name="psd_stopping",
    loss=stopping(PSD.loss),
    constants=dataclasses.replace(PSD.constants, model="vit-micro"),
)


def alternating_loss(outputs, fields, constants, progress):
    """clip_kd whose ICL, and with it a parameter of its own, has a part in every second step alone."""
    terms, notes = loss(outputs, fields, constants, progress)
    return {name: term for name, term in terms.items() if name != "icl" or progress.step % 2}, notes


ALTERNATING = dataclasses.replace(MICRO, name="alternating", loss=alternating_loss)


TD_MICRO = dataclasses.replace(CLIP_TD.constants, model="uniter-micro")
TD_STOPPING = dataclasses.replace(
    CLIP_TD, name="td_stopping", loss=stopping(CLIP_TD.loss), constants=TD_MICRO
)


def still_build(*words):
    """A single-stream student without dropout."""
    student = build_td(*words)
    for module in student.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return student


TD_STILL = dataclasses.replace(CLIP_TD, name="td_still", student=still_build, constants=TD_MICRO)


SDS_MICRO = dataclasses.replace(SDS_CLIP.constants, model="vit-micro", sds_weight=0.1)
SDS_STOPPING = dataclasses.replace(
    SDS_CLIP,
    name="sds_stopping",
    loss=stopping(SDS_CLIP.loss),
    constants=SDS_MICRO,
    optim=dataclasses.replace(SDS_CLIP.optim, lr=1e-2, weight_decay=0.5),
)


def deaf_call(*words):
    """A teacher under no_grad by mistake."""
    with torch.no_grad():
        return SDS_CLIP.gradient_teacher.call(*words)


SDS_DEAF = dataclasses.replace(
    SDS_CLIP,
    name="sds_deaf",
    constants=SDS_MICRO,
    gradient_teacher=dataclasses.replace(SDS_CLIP.gradient_teacher, call=deaf_call),
)
