"""Distillation-only parameters: trained, synchronised, sharded and checkpointed with the student, never exported.

Each module takes the student's outputs and the teacher's fields of this rank's rows by name and gives more outputs.
"""

import math
from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import normalize

from student.ensemble import named, of_teacher
from student.models.logit_scale import LOG_SCALE_INIT


def _linear(own: int, wanted: int) -> nn.Module:
    return nn.Identity() if own == wanted else nn.Linear(own, wanted)


def _log_scale() -> nn.Parameter:
    """CLIP's start; a parameter whose name ends with logit_scale is clamped as CLIP's is."""
    return nn.Parameter(torch.full((1,), LOG_SCALE_INIT))


class TeacherSpace(nn.Module):
    """Raw student features in the teacher's widths (CLIP-KD: V', S'), and a learnable scale g where a term has one."""

    def __init__(self, widths: tuple[int, int], teacher_widths: tuple[int, int], *, scale: bool = True):
        super().__init__()
        self.image, self.text = (_linear(*pair) for pair in zip(widths, teacher_widths, strict=True))
        self.icl_logit_scale = _log_scale() if scale else None

    def forward(self, values: Mapping[str, Tensor]) -> dict[str, Float[Tensor, "..."]]:
        """`image_in_teacher_space`, `text_in_teacher_space` and, of a masked forward, `masked_image_in_teacher_space` [n, teacher width]; the scalar `icl_scale`."""
        found = {
            "image_in_teacher_space": self.image(values["image"]),
            "text_in_teacher_space": self.text(values["text"]),
        }
        if "masked_image" in values:
            found["masked_image_in_teacher_space"] = self.image(values["masked_image"])
        return (
            found
            if self.icl_logit_scale is None
            else found | {"icl_scale": self.icl_logit_scale.exp().reshape(())}
        )


class Temperature(nn.Module):
    """VLKD's learnable temperature tau of ITCL, as the scale 1 / tau."""

    def __init__(self, tau: float):
        super().__init__()
        self.logit_scale = nn.Parameter(torch.full((1,), -math.log(tau)))

    def forward(self, values: Mapping[str, Tensor]) -> dict[str, Float[Tensor, "..."]]:
        """`itcl_scale`, a scalar."""
        return {"itcl_scale": self.logit_scale.exp().reshape(())}


class Fusion(nn.Module):
    """CLIP-KD's augmented embeddings W [V'; V_T], W' [S'; S_T] in the teacher's widths, and a scale f of their own."""

    def __init__(self, teacher_widths: tuple[int, int]):
        super().__init__()
        self.image, self.text = (nn.Linear(2 * width, width) for width in teacher_widths)
        self.logit_scale = _log_scale()

    def forward(self, values: Mapping[str, Tensor]) -> dict[str, Float[Tensor, "..."]]:
        """`image_fused`, `text_fused` [n, teacher width] and the scalar `fused_scale`; what is fused is normalised first."""
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
        found = {"image_fused": self.image(pairs["image"]), "text_fused": self.text(pairs["text"])}
        return found | {"fused_scale": self.logit_scale.exp().reshape(())}


class HiddenSpace(nn.Module):
    """Outputs of student blocks in the widths of the teacher's (CLIP-KD, appendix Fig. 2): a linear map per pair."""

    def __init__(
        self, pairs: Sequence[tuple[str, str]], widths: Mapping[str, int], teacher_widths: Mapping[str, int]
    ):
        super().__init__()
        self.pairs = pairs
        self.maps = nn.ModuleList(_linear(widths[block], teacher_widths[field]) for block, field in pairs)

    def forward(self, values: Mapping[str, Tensor]) -> dict[str, Float[Tensor, "n width"]]:
        """`<block>:<field>` [n, width of the field] of each pair of names."""
        maps = zip(self.pairs, self.maps, strict=True)
        return {f"{block}:{field}": mapped(values[block]) for (block, field), mapped in maps}


class Chain(nn.Module):
    """Heads one after another; each sees what those before it gave."""

    def __init__(self, heads: Sequence[nn.Module]):
        super().__init__()
        self.heads = nn.ModuleList(heads)

    def forward(self, values: Mapping[str, Tensor]) -> dict[str, Float[Tensor, "..."]]:
        """The outputs of all of them."""
        found: dict[str, Tensor] = {}
        for head in self.heads:
            found |= head({**values, **found})
        return found


class PerTeacher(nn.Module):
    """Heads of their own for each of several teachers."""

    def __init__(self, heads: Sequence[nn.Module]):
        super().__init__()
        self.heads = nn.ModuleList(heads)

    def forward(self, values: Mapping[str, Tensor]) -> dict[str, Float[Tensor, "..."]]:
        """Outputs of teacher k under `name@k`."""
        found: dict[str, Tensor] = {}
        for k, head in enumerate(self.heads):
            found |= {named(name, k): value for name, value in head(of_teacher(values, k)).items()}
        return found


class TokenSpace(nn.Module):
    """A single-stream student's elements in the teacher's width (CLIP-TD: the papers leave the map open; linear)."""

    def __init__(self, hidden: int, width: int):
        super().__init__()
        self.image, self.text, self.words = (nn.Linear(hidden, width) for _ in range(3))

    def forward(self, values: Mapping[str, Tensor]) -> dict[str, Float[Tensor, "..."]]:
        """`image_in_teacher_space`, `cls_in_teacher_space` [n, C, width] and, where words were selected, `words_in_teacher_space` [n, C, m, width]."""
        found = {
            "image_in_teacher_space": self.image(values["picture"]),
            "cls_in_teacher_space": self.text(values["cls"]),
        }
        return found | ({"words_in_teacher_space": self.words(values["words"])} if "words" in values else {})


class LatentSpace(nn.Module):
    """SDS-CLIP's h_w: a linear map, without a bias, from the image embedding to what a UNet reads or says.

    `start` is "default" (nn.Linear's own), "zero", or "unit" (elements of unit variance for unit embeddings).
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
        """`latent` [n, *shape] of `image` [n, width], of its direction alone where `unit`."""
        image = values["image"]
        return {"latent": self.linear(normalize(image) if self.unit else image).unflatten(1, self.shape)}
