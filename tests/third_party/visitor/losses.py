"""A loss of the visitors' own."""

# --8<-- [start:huber]
from jaxtyping import Float
from torch import Tensor


def huber_loss(ours: Float[Tensor, "n d"], theirs: Float[Tensor, "n d"]) -> Float[Tensor, ""]:
    """Return the mean Huber distance of two sets of rows."""
    from torch.nn.functional import smooth_l1_loss

    return smooth_l1_loss(ours, theirs)


# --8<-- [end:huber]
