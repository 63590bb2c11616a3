"""The projection heads of clip-lite, trained on cached tower features without decoding any picture."""

from collections.abc import Mapping

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import dropout

from student.contract import Capability, RowInputs, StudentSpec
from student.models.logit_scale import LOG_SCALE_INIT
from teachercache.teachers.clip.lite import EMBED_DIM, head_modules

IMAGE_DROPOUT, TEXT_DROPOUT = 0.5, 0.25


class LiteHeads(nn.Module):
    """Linear heads of images, 1280 -> 512, and of texts, 384 -> 512, with a logit scale.

    Dropout on the features replaces augmentation, which cached features cannot have (LOG.md, "clip-lite").
    """

    def __init__(self) -> None:
        super().__init__()
        heads = head_modules()
        self.image, self.text = heads["image"], heads["text"]
        self.logit_scale = nn.Parameter(torch.full((1,), LOG_SCALE_INIT))

    def forward(self, batch: Mapping[str, Tensor]) -> dict[str, Float[Tensor, "..."]]:
        """Map cached tower features to raw `image`, `text` [n, 512] and the scalar `scale`."""
        image = dropout(batch["image_emb"], IMAGE_DROPOUT, self.training)
        text = dropout(batch["text_emb"], TEXT_DROPOUT, self.training)
        return {
            "image": self.image(image),
            "text": self.text(text),
            "scale": self.logit_scale.exp().reshape(()),
        }

    @property
    def spec(self) -> StudentSpec:
        """The family; the heads have one fixed size."""
        return StudentSpec("clip_lite_heads", {})

    @property
    def row_inputs(self) -> RowInputs:
        """The cached features of clip-lite-towers."""
        return RowInputs(fields=("image_emb", "text_emb"))

    def capabilities(self) -> frozenset[Capability]:
        """Return the capabilities of training; `scripts.teachers.clip_lite` joins heads and towers."""
        return frozenset({Capability.COMPILES, Capability.SHARDS_PARAMETERS})

    def limits(self) -> dict[Capability, str]:
        """Return why it cannot encode or be exported: it has no towers."""
        reason = "clip-lite-heads has no towers: join them with scripts/teachers/clip_lite.py"
        kinds = (Capability.ENCODES, Capability.EXPORTS_OPEN_CLIP, Capability.EXPORTS_HF)
        return dict.fromkeys(kinds, reason)

    def saved_state(self) -> dict[str, Tensor]:
        """Return the state dict."""
        return self.state_dict()

    def load_saved_state(self, state: Mapping[str, Tensor]) -> None:
        """Load a state dict."""
        self.load_state_dict(dict(state))

    @property
    def widths(self) -> tuple[int, int]:
        """Widths of the image and the text embedding."""
        return EMBED_DIM, EMBED_DIM
