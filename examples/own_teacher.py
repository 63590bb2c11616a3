"""A teacher of your own: it describes a picture by a histogram of its colors.

    tc build --teacher own_teacher:COLORS --data photos/ --out colors.zarr
    tc verify colors.zarr --teacher own_teacher:COLORS
    tc search colors.zarr --key KEY                              # pictures with similar colors

Run the commands in the folder of this file, or install the file as a package with an entry point:

    [options.entry_points]
    teachercache.teachers =
        colors = own_teacher:COLORS

A network of yours takes the place of `Histogram`; then `weights` names its checkpoint, and the spec holds the digest of
its weights (`teachercache.teachers.weights.digest_weights`).
"""

import torch
from torch import Tensor, nn

from teachercache.cache.spec import Field, TeacherSpec
from teachercache.core.errors import UserError
from teachercache.data.views import describe_view, image_view
from teachercache.teachers.teacher import Entry, Inputs, Teacher

BINS = 8  # per channel


class Histogram(nn.Module):
    """Counts the colors of pictures [n, 3, height, width] with values from 0 to 1."""

    def forward(self, images: Tensor) -> Tensor:
        """Compute the share of pixels in each bin of each channel [n, 3 * BINS]."""
        bins = (images.clamp(0, 1 - 1e-6) * BINS).long()
        shares = [(bins == number).flatten(2).float().mean(2) for number in range(BINS)]
        return torch.stack(shares, 2).flatten(1)


def encode(module: nn.Module, inputs: Inputs) -> dict[str, Tensor]:
    """Compute the field `histogram` of the distinct pictures of a batch."""
    return {"histogram": module(inputs["image"])}


def load(name: str, *, weights: str, outputs: tuple[str, ...]) -> Teacher:
    """Return the teacher in evaluation mode on the CPU."""
    if weights != "pretrained":
        raise UserError(f"--weights {weights}: {name} has no weights; leave --weights out")
    view = describe_view({"size": 64, "mean": (0, 0, 0), "std": (1, 1, 1)})
    spec = TeacherSpec(
        name=name,
        weights=weights,
        digest="histogram-1",  # change it when the values change
        outputs=outputs,
        fields=(Field("histogram", (3 * BINS,), "image", "float32", f"{BINS} bins of each channel"),),
        view=view,
        tokenizer={},
        constants={},
        inputs=("image",),
    )
    return Teacher(spec, Histogram().eval(), encode, image_view(view))


COLORS = Entry("histogram of colors", load, ("histogram",), writes={"histogram": "histogram"})
