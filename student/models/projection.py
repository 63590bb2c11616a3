"""Distillation-only parameters: trained, synchronised, sharded and checkpointed with the student, never exported."""

from collections.abc import Mapping

import torch
from jaxtyping import Float
from torch import Tensor, nn

from student.models import LOG_SCALE_INIT


class TeacherSpace(nn.Module):
    """Raw student features in the teacher's widths (CLIP-KD: V', S'), and a learnable scale g."""

    def __init__(self, widths: tuple[int, int], teacher_widths: tuple[int, int]):
        super().__init__()
        pairs = zip(widths, teacher_widths, strict=True)
        self.image, self.text = (nn.Identity() if own == wanted else nn.Linear(own, wanted) for own, wanted in pairs)
        self.icl_logit_scale = nn.Parameter(torch.full((1,), LOG_SCALE_INIT))

    def forward(self, student: Mapping[str, Tensor]) -> dict[str, Float[Tensor, "..."]]:
        """`image_t`, `text_t` [n, teacher width] and `icl_scale` [1] from the student's raw outputs."""
        image, text = self.image(student["image"]), self.text(student["text"])
        return {"image_t": image, "text_t": text, "icl_scale": self.icl_logit_scale.exp()}
