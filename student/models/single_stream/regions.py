"""Regions of a picture as elements of a single-stream transformer: UNITER's and VL-BERT's embeddings of them.

A region comes as its cached feature and its box, x1 y1 x2 y2 as shares of the picture; a box of zeros is no region, and
region 0 is the whole picture. Not for detecting them: see `teachercache.teachers.regions`.
"""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

SCALE = 0.2  # VL-BERT from scratch: of the visual feature embedding in each element
WAVES = 8  # VL-BERT: wavelengths per coordinate; the paper embeds each in 1/4 of 2048 numbers


def valid_regions(box: Float[Tensor, "... 4"]) -> Bool[Tensor, "..."]:
    """Return which places hold a region: those of some width and height."""
    return (box[..., 2] > box[..., 0]) & (box[..., 3] > box[..., 1])


def trim_regions(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the batch without the places for regions that none of its rows has."""
    if "region_box" not in batch:
        return batch
    box = batch["region_box"]
    used = (box[..., 2] > box[..., 0]).any(0)
    most = int(used.nonzero().max()) + 1 if used.any() else 1
    return batch | {name: batch[name][:, :most] for name in ("region_feature", "region_box")}


def geometry(box: Float[Tensor, "... 4"]) -> Float[Tensor, "... 7"]:
    """UNITER's seven numbers: x1, y1, x2, y2, width, height, area, all as shares of the picture."""
    x1, y1, x2, y2 = box.unbind(-1)
    width, height = x2 - x1, y2 - y1
    return torch.stack([x1, y1, x2, y2, width, height, width * height], -1)


def waves(box: Float[Tensor, "... 4"], number: int = WAVES) -> Float[Tensor, "... waves"]:
    """VL-BERT's geometry embedding: sine and cosine of each coordinate at `number` wavelengths, 8 numbers of each."""
    lengths = 1000.0 ** (torch.arange(number, device=box.device, dtype=box.dtype) / number)
    angles = 100 * box.unsqueeze(-1) / lengths  # [..., 4, number]
    return torch.cat([angles.sin(), angles.cos()], -1).flatten(-2)


class UniterRegions(nn.Module):
    """LN(LN(W f) + LN(W' geometry) + type), names as in UNITER's released checkpoints."""

    def __init__(self, width: int, hidden: int, eps: float, dropout: float):
        super().__init__()
        self.img_linear, self.pos_linear = nn.Linear(width, hidden), nn.Linear(7, hidden)
        self.img_layer_norm, self.pos_layer_norm = nn.LayerNorm(hidden, eps), nn.LayerNorm(hidden, eps)
        self.LayerNorm, self.dropout = nn.LayerNorm(hidden, eps), nn.Dropout(dropout)

    def forward(
        self, feature: Float[Tensor, "n r d"], box: Float[Tensor, "n r 4"], kind: Float[Tensor, " h"]
    ) -> Float[Tensor, "n r h"]:
        """Elements of the picture; `kind` is the token type embedding of pictures."""
        where = self.pos_layer_norm(self.pos_linear(geometry(box)))
        return self.dropout(self.LayerNorm(self.img_layer_norm(self.img_linear(feature)) + where + kind))


class VlBertRegions(nn.Module):
    """VL-BERT's visual feature embedding, LN(W [W_a f; waves(box)]), and its [IMG] token.

    Every element has one: a region its own, a word that of the object that it names (VCR) or else of the whole picture
    (region 0), each kind under a LayerNorm of its own. Free choices: no [END] element; the LayerNorms' weights begin at
    SCALE, beside words of 0.02, in a student from scratch (0.02 and 1 both learn later to see). A BERT that starts the
    student begins at 0, as the paper's does, so that it reads its words first as it did: `single_stream_init`.
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
        """What both kinds of elements have of each region."""
        return self.visual(torch.cat([self.appearance(feature), waves(box)], -1))

    def of_words(
        self, visual: Float[Tensor, "n r h"], box: Float[Tensor, "n r 4"], region: Int[Tensor, "n l"]
    ) -> Float[Tensor, "n l h"]:
        """The visual feature embedding of words that speak of `region`; of region 0 where there is no such region."""
        region = torch.where(region < visual.shape[1], region, 0)
        region = region * valid_regions(box).gather(1, region)
        return self.word_norm(visual).gather(1, region.unsqueeze(-1).expand(-1, -1, visual.shape[-1]))

    def forward(
        self, visual: Float[Tensor, "n r h"], rest: Float[Tensor, "n any h"]
    ) -> Float[Tensor, "n r h"]:
        """Elements of the picture; `rest` is type and position, which all of them share."""
        return self.dropout(self.join(self.region_norm(visual) + self.image_token + rest))
