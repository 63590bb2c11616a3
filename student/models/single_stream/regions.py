"""Embed the regions of a picture as elements of a single-stream transformer, as UNITER and VL-BERT do.

A region is a cached feature and a box x1, y1, x2, y2 in fractions of the picture. A box of zeros is padding,
and region 0 is the whole picture. `teachercache.teachers.regions` detects the regions.
"""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

# VL-BERT from scratch: initial LayerNorm weight of the visual feature embedding in each element
SCALE = 0.2
# VL-BERT: wavelengths per coordinate; the paper embeds each coordinate in 1/4 of 2048 dimensions
WAVES = 8


def valid_regions(box: Float[Tensor, "... 4"]) -> Bool[Tensor, "..."]:
    """Return the mask of valid regions: those with positive width and height."""
    return (box[..., 2] > box[..., 0]) & (box[..., 3] > box[..., 1])


def trim_regions(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the batch without the trailing regions that are padding in every row."""
    if "region_box" not in batch:
        return batch
    box = batch["region_box"]
    used = (box[..., 2] > box[..., 0]).any(0)
    most = int(used.nonzero().max()) + 1 if used.any() else 1
    return batch | {name: batch[name][:, :most] for name in ("region_feature", "region_box")}


def geometry(box: Float[Tensor, "... 4"]) -> Float[Tensor, "... 7"]:
    """Return UNITER's box features: x1, y1, x2, y2, width, height and area, in fractions of the picture."""
    x1, y1, x2, y2 = box.unbind(-1)
    width, height = x2 - x1, y2 - y1
    return torch.stack([x1, y1, x2, y2, width, height, width * height], -1)


def waves(box: Float[Tensor, "... 4"], number: int = WAVES) -> Float[Tensor, "... waves"]:
    """Return VL-BERT's geometry embedding: sine and cosine of each coordinate at several wavelengths.

    Args:
        box: Boxes in fractions of the picture.
        number: Wavelengths per coordinate; the output has 8 * number features.
    """
    lengths = 1000.0 ** (torch.arange(number, device=box.device, dtype=box.dtype) / number)
    angles = 100 * box.unsqueeze(-1) / lengths  # [..., 4, number]
    return torch.cat([angles.sin(), angles.cos()], -1).flatten(-2)


class UniterRegions(nn.Module):
    """LN(LN(W f) + LN(W' geometry) + type), with the parameter names of UNITER's released checkpoints."""

    def __init__(self, width: int, hidden: int, eps: float, dropout: float):
        super().__init__()
        self.img_linear, self.pos_linear = nn.Linear(width, hidden), nn.Linear(7, hidden)
        self.img_layer_norm, self.pos_layer_norm = nn.LayerNorm(hidden, eps), nn.LayerNorm(hidden, eps)
        self.LayerNorm, self.dropout = nn.LayerNorm(hidden, eps), nn.Dropout(dropout)

    def forward(
        self, feature: Float[Tensor, "n r d"], box: Float[Tensor, "n r 4"], kind: Float[Tensor, " h"]
    ) -> Float[Tensor, "n r h"]:
        """Return the elements of the regions; `kind` is the token-type embedding of pictures."""
        position = self.pos_layer_norm(self.pos_linear(geometry(box)))
        return self.dropout(self.LayerNorm(self.img_layer_norm(self.img_linear(feature)) + position + kind))


class VlBertRegions(nn.Module):
    """VL-BERT's visual feature embedding, LN(W [W_a f; waves(box)]), and its [IMG] token.

    Every element has such an embedding. A region has its own; a word has that of the object it names (VCR) or
    of the whole picture (region 0). Words and regions have separate LayerNorms. Free choices: there is no
    [END] element, and in a student from scratch the LayerNorm weights start at SCALE, next to word embeddings
    of 0.02 (with 0.02 or 1 the student learns to use pictures later). If a BERT initializes the student they
    start at 0, as in the paper, so that the student first processes words as that BERT did
    (`loading.load_into`).
    """

    def __init__(self, width: int, hidden: int, eps: float, dropout: float):
        super().__init__()
        self.appearance = nn.Linear(width, hidden)
        self.visual = nn.Linear(hidden + 8 * WAVES, hidden)
        self.word_norm, self.region_norm = nn.LayerNorm(hidden, eps), nn.LayerNorm(hidden, eps)
        for norm in (self.word_norm, self.region_norm):
            nn.init.constant_(norm.weight, SCALE)
        self.image_token = nn.Parameter(torch.empty(hidden).normal_(0, 0.02))
        self.join, self.dropout = nn.LayerNorm(hidden, eps), nn.Dropout(dropout)

    def features(
        self, feature: Float[Tensor, "n r d"], box: Float[Tensor, "n r 4"]
    ) -> Float[Tensor, "n r h"]:
        """Return the visual feature embedding of each region before its LayerNorm."""
        return self.visual(torch.cat([self.appearance(feature), waves(box)], -1))

    def of_words(
        self, visual: Float[Tensor, "n r h"], box: Float[Tensor, "n r 4"], region: Int[Tensor, "n l"]
    ) -> Float[Tensor, "n l h"]:
        """Return the visual embedding of each word's `region`, or of region 0 if that region is padding."""
        region = torch.where(region < visual.shape[1], region, 0)
        region = region * valid_regions(box).gather(1, region)
        return self.word_norm(visual).gather(1, region.unsqueeze(-1).expand(-1, -1, visual.shape[-1]))

    def forward(
        self, visual: Float[Tensor, "n r h"], rest: Float[Tensor, "n any h"]
    ) -> Float[Tensor, "n r h"]:
        """Return the elements of the regions; `rest` is the shared embedding of type and position."""
        return self.dropout(self.join(self.region_norm(visual) + self.image_token + rest))
