"""Which rows of a data set are measured."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Int

from teachercache.core.errors import UserError
from teachercache.data.manifest import Manifest

VAL_FIRST = ("val", "validation", "test")  # sets whose test labels are not public
TEST_FIRST = ("test", "val", "validation")


def rows_to_measure(manifest: Manifest, splits: Sequence[str] = VAL_FIRST) -> Int[np.ndarray, " n"]:
    """Return all rows if there is only one split, otherwise the rows of the first of `splits` that exists.

    Raises:
        UserError: If none of the splits exists.
    """
    present = set(manifest.column("split"))
    if len(present) == 1:
        return np.arange(len(manifest))
    split = next((split for split in splits if split in present), None)
    if split is None:
        wanted = " nor ".join(split for split in splits if split != "validation")
        raise UserError(
            f"{manifest.data} has the splits {', '.join(sorted(present))} but neither {wanted}: pass the "
            "file of one split"
        )
    return manifest.rows_of_split(split)
