"""The projection heads of clip-lite alone, trained on the towers' cached features: no picture is decoded."""

from collections.abc import Mapping

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import dropout

from student.models.logit_scale import LOG_SCALE_INIT
from teachercache.teachers.clip.lite import EMBED_DIM, head_modules

IMAGE_DROPOUT, TEXT_DROPOUT = 0.5, 0.25


class LiteHeads(nn.Module):
    """Image head 1280 -> 512 (two layers) and text head 384 -> 512 (linear) with a logit scale.

    Dropout on the features stands in for the augmentation that cached features cannot have (LOG.md, "clip-lite").
    """

    inputs = ("image_emb", "text_emb")

    def __init__(self):
        super().__init__()
        heads = head_modules()
        self.image, self.text = heads["image"], heads["text"]
        self.logit_scale = nn.Parameter(torch.full((1,), LOG_SCALE_INIT))

    def forward(self, batch: Mapping[str, Tensor]) -> dict[str, Float[Tensor, "..."]]:
        """Cached tower features to raw `image`, `text` [n, 512] and `scale` [1]."""
        image = dropout(batch["image_emb"], IMAGE_DROPOUT, self.training)
        text = dropout(batch["text_emb"], TEXT_DROPOUT, self.training)
        return {"image": self.image(image), "text": self.text(text), "scale": self.logit_scale.exp()}

    @property
    def widths(self) -> tuple[int, int]:
        """Widths of the image and the text embedding."""
        return EMBED_DIM, EMBED_DIM
