"""Modules that only distillation needs: trained, sharded and checkpointed with the student, never exported.

Each module maps the student's outputs and the teacher's fields of this rank's rows, by name, to additional
outputs.
"""

import math
from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import normalize

from student.ensemble import named, of_teacher
from student.models.logit_scale import LOG_SCALE_INIT


def _linear(width: int, teacher_width: int) -> nn.Module:
    """Return a linear map to the teacher's width, or the identity if the widths agree."""
    return nn.Identity() if width == teacher_width else nn.Linear(width, teacher_width)


def _log_scale() -> nn.Parameter:
    """Return a logit scale that starts as CLIP's; training clamps parameters named `*logit_scale`."""
    return nn.Parameter(torch.full((1,), LOG_SCALE_INIT))


class TeacherSpace(nn.Module):
    """Maps from raw student features to the teacher's widths (CLIP-KD: V', S'), and the learnable scale g.

    Args:
        widths: Widths of the student's image and text features.
        teacher_widths: Widths of the teacher's.
        scale: Learn g, which ICL and cross distillation use.
    """

    def __init__(self, widths: tuple[int, int], teacher_widths: tuple[int, int], *, scale: bool = True):
        super().__init__()
        self.image, self.text = (_linear(*pair) for pair in zip(widths, teacher_widths, strict=True))
        self.icl_logit_scale = _log_scale() if scale else None

    def forward(self, values: Mapping[str, Tensor]) -> dict[str, Float[Tensor, "..."]]:
        """Map the student's features to the teacher's widths.

        Returns:
            `image_in_teacher_space`, `text_in_teacher_space` [n, teacher width], and where they apply
            `masked_image_in_teacher_space` [n, teacher width] and the scalar `icl_scale`.
        """
        outputs = {
            "image_in_teacher_space": self.image(values["image"]),
            "text_in_teacher_space": self.text(values["text"]),
        }
        if "masked_image" in values:
            outputs["masked_image_in_teacher_space"] = self.image(values["masked_image"])
        if self.icl_logit_scale is not None:
            outputs["icl_scale"] = self.icl_logit_scale.exp().reshape(())
        return outputs


class Temperature(nn.Module):
    """The learnable temperature tau of VLKD's ITCL loss, stored as the scale 1 / tau."""

    def __init__(self, tau: float):
        super().__init__()
        self.logit_scale = nn.Parameter(torch.full((1,), -math.log(tau)))

    def forward(self, values: Mapping[str, Tensor]) -> dict[str, Float[Tensor, "..."]]:
        """Return the scalar `itcl_scale`."""
        return {"itcl_scale": self.logit_scale.exp().reshape(())}


class Fusion(nn.Module):
    """CLIP-KD's augmented embeddings W [V'; V_T], W' [S'; S_T] in the teacher's widths, and their scale f."""

    def __init__(self, teacher_widths: tuple[int, int]):
        super().__init__()
        self.image, self.text = (nn.Linear(2 * width, width) for width in teacher_widths)
        self.logit_scale = _log_scale()

    def forward(self, values: Mapping[str, Tensor]) -> dict[str, Float[Tensor, "..."]]:
        """Fuse the normalized embeddings of student and teacher.

        Returns:
            `image_fused`, `text_fused` [n, teacher width] and the scalar `fused_scale`.
        """
        pairs = {
            name: torch.cat(
                [
                    normalize(values[f"{name}_in_teacher_space"].float()),
                    normalize(values[f"{name}_emb"].float()),
                ],
                1,
            )
            for name in ("image", "text")
        }
        fused = {"image_fused": self.image(pairs["image"]), "text_fused": self.text(pairs["text"])}
        return fused | {"fused_scale": self.logit_scale.exp().reshape(())}


class HiddenSpace(nn.Module):
    """Linear maps from student blocks to the teacher's widths (CLIP-KD, appendix Fig. 2).

    Args:
        pairs: Names of a student's block and of a teacher's field, per map.
        widths: Widths of the student's blocks, by name.
        teacher_widths: Widths of the teacher's fields, by name.
    """

    def __init__(
        self, pairs: Sequence[tuple[str, str]], widths: Mapping[str, int], teacher_widths: Mapping[str, int]
    ):
        super().__init__()
        self.pairs = pairs
        self.maps = nn.ModuleList(_linear(widths[block], teacher_widths[field]) for block, field in pairs)

    def forward(self, values: Mapping[str, Tensor]) -> dict[str, Float[Tensor, "n width"]]:
        """Return `<block>:<field>` [n, width of the field] for each pair of names."""
        maps = zip(self.pairs, self.maps, strict=True)
        return {f"{block}:{field}": linear(values[block]) for (block, field), linear in maps}


class Chain(nn.Module):
    """A sequence of heads; each also reads the outputs of the heads before it."""

    def __init__(self, heads: Sequence[nn.Module]):
        super().__init__()
        self.heads = nn.ModuleList(heads)

    def forward(self, values: Mapping[str, Tensor]) -> dict[str, Float[Tensor, "..."]]:
        """Return the outputs of all heads."""
        outputs: dict[str, Tensor] = {}
        for head in self.heads:
            outputs |= head({**values, **outputs})
        return outputs


class PerTeacher(nn.Module):
    """Separate heads for each of several teachers."""

    def __init__(self, heads: Sequence[nn.Module]):
        super().__init__()
        self.heads = nn.ModuleList(heads)

    def forward(self, values: Mapping[str, Tensor]) -> dict[str, Float[Tensor, "..."]]:
        """Return the outputs for teacher k as `name@k`."""
        outputs: dict[str, Tensor] = {}
        for k, head in enumerate(self.heads):
            outputs |= {named(name, k): value for name, value in head(of_teacher(values, k)).items()}
        return outputs


class TokenSpace(nn.Module):
    """Linear maps from a single-stream student to the teacher's width (CLIP-TD leaves their form open)."""

    def __init__(self, hidden: int, width: int):
        super().__init__()
        self.image, self.text, self.words = (nn.Linear(hidden, width) for _ in range(3))

    def forward(self, values: Mapping[str, Tensor]) -> dict[str, Float[Tensor, "..."]]:
        """Map the student's elements to the teacher's width.

        Returns:
            `image_in_teacher_space`, `cls_in_teacher_space` [n, C, width] and, if words were selected,
            `words_in_teacher_space` [n, C, m, width].
        """
        outputs = {
            "image_in_teacher_space": self.image(values["picture"]),
            "cls_in_teacher_space": self.text(values["cls"]),
        }
        if "words" in values:
            outputs["words_in_teacher_space"] = self.words(values["words"])
        return outputs


class LatentSpace(nn.Module):
    """SDS-CLIP's h_w: a linear map without bias from the image embedding to a UNet's latent or features.

    Args:
        width: Width of the image embedding.
        shape: Shape of the latent or feature of one picture.
        start: Initial weights: "default" (as nn.Linear), "zero", or "unit" (elements of unit variance for
            unit embeddings).
        unit: Normalize the embedding first.
    """

    def __init__(self, width: int, shape: Sequence[int], *, start: str = "default", unit: bool = True):
        super().__init__()
        self.shape, self.unit = tuple(shape), unit
        self.linear = nn.Linear(width, math.prod(shape), bias=False)
        if start == "zero":
            nn.init.zeros_(self.linear.weight)
        elif start == "unit":
            nn.init.normal_(self.linear.weight)

    def forward(self, values: Mapping[str, Tensor]) -> dict[str, Float[Tensor, "n ..."]]:
        """Map `image` [n, width] to `latent` [n, *shape]."""
        image = values["image"]
        return {"latent": self.linear(normalize(image) if self.unit else image).unflatten(1, self.shape)}
