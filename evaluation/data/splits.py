"""Which rows of a data set are measured."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Int

from teachercache.core.errors import UserError
from teachercache.core.progress import say
from teachercache.data.manifest import Manifest
from teachercache.data.readers.rows import split_named

VAL_FIRST = ("val", "test")  # sets whose test labels are not public, and the choice of checkpoints
TEST_FIRST = ("test", "val")


def known_splits(manifest: Manifest) -> list[str]:
    """Return the split of each row: train, val or test for each word that names it (validation, Test), otherwise the
    word itself.
    """
    words = manifest.column("split")
    split = {word: split_named(word) for word in set(words)}
    return [split[word] for word in words]


def rows_in(manifest: Manifest, split: str) -> Int[np.ndarray, " n"]:
    """Return the rows of a split, or all rows if the data has no splits."""
    splits = np.array(known_splits(manifest), object)
    return np.flatnonzero((splits == split) | ~(splits != "").any())


def rows_or_only_split(manifest: Manifest, split: str) -> Int[np.ndarray, " n"]:
    """Return the rows of a split as `rows_in` does. If the data has one other split and no training rows, return that.

    Raises:
        UserError: The data has several splits without this one; the message names them.
    """
    rows = rows_in(manifest, split)
    present = sorted(set(known_splits(manifest)) - {""})
    if len(rows) or not present:
        return rows
    if len(present) == 1 and present != ["train"]:
        say(f"{manifest.data} has no {split} rows: its only split, {present[0]}, is measured")
        return rows_in(manifest, present[0])
    return rows


def others_than(manifest: Manifest, split: str) -> str:
    """Return " (its splits are ...)" for an error about a missing split, "" if the data has that split or none."""
    present = sorted(set(known_splits(manifest)) - {""})
    return f" (its splits are {', '.join(present)})" if present and split not in present else ""


def rows_to_measure(manifest: Manifest, splits: Sequence[str] = VAL_FIRST) -> Int[np.ndarray, " n"]:
    """Return all rows if there is only one split, otherwise the rows of the first of `splits` that exists.

    Raises:
        UserError: If none of the splits exists.
    """
    present = set(known_splits(manifest))
    if len(present) == 1:
        return np.arange(len(manifest))
    split = next((split for split in splits if split in present), None)
    if split is None:
        raise UserError(
            f"{manifest.data} has the splits {', '.join(sorted(present))} but neither {' nor '.join(splits)}: pass the "
            "file of one split"
        )
    return rows_in(manifest, split)
