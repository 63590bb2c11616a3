"""Logits of N pairs tile by tile, and softmaxes over what arrives in tiles. Knows no loss: tiled.py does.

A rank that takes some of the rows would loop over those row tiles alone: its rows' streams are then complete, and its
columns' are to be merged over ranks before lse().
"""

import dataclasses
from collections.abc import Iterator

import torch
from jaxtyping import Float
from torch import Tensor

# On a CPU 512 and 1024 are as fast as each other, 2048 takes 1.1 times as long; every operation on a tile waits for all
# threads, and where they share their cores with other processes a quarter of the operations is much faster. On CUDA a
# guess: 64 MiB in float32.
TILE = {"cpu": 1024, "cuda": 4096}


def tile_size(rows: Float[Tensor, "n d"]) -> int:
    """Rows and columns of a tile on a device."""
    return TILE.get(rows.device.type, TILE["cuda"])


@dataclasses.dataclass(frozen=True)
class Logits:
    """Z = a X Y^T, never whole."""

    X: Float[Tensor, "n d"]
    Y: Float[Tensor, "n d"]
    a: Float[Tensor, ""]

    def tile(self, i: slice, j: slice) -> Float[Tensor, "i j"]:
        """Rows i and columns j of Z."""
        return (self.a * self.X[i]) @ self.Y[j].T


def cut(count: int, size: int) -> list[slice]:
    """0 to count in slices of a size; the last one may be smaller."""
    return [slice(start, min(start + size, count)) for start in range(0, count, size)]


def tiles(logits: Logits, size: int) -> Iterator[tuple[slice, slice]]:
    """Square tiles, row by row: i == j are those on the diagonal."""
    parts = cut(len(logits.X), size)
    return ((i, j) for i in parts for j in parts)


class Stream:
    """Log-sum-exp over dimension `dim` of logits that arrive in tiles; means of something under their softmax."""

    def __init__(self, logits: Logits, dim: int) -> None:
        shape = (len(logits.X), 1) if dim else (1, len(logits.X))
        self.dim = dim
        self.top = logits.X.new_full(shape, -torch.inf)
        self.total, self.sums = logits.X.new_zeros(shape), logits.X.new_zeros(shape)

    def add(self, at: slice, tile: Float[Tensor, "i j"], what: Float[Tensor, "i j"] | None = None) -> None:
        """A tile whose rows, or columns, are `at`; `what` is overwritten."""
        start, count = at.start, at.stop - at.start
        top, total, sums = (
            part.narrow(1 - self.dim, start, count) for part in (self.top, self.total, self.sums)
        )
        higher = torch.maximum(top, tile.amax(self.dim, keepdim=True))
        shrink = (top - higher).exp_()
        weights = (tile - higher).exp_()
        total.mul_(shrink).add_(weights.sum(self.dim, keepdim=True))
        if what is not None:
            sums.mul_(shrink).add_(what.mul_(weights).sum(self.dim, keepdim=True))
        top.copy_(higher)

    def lse(self) -> Float[Tensor, "..."]:
        """Log-sum-exps, [n, 1] of rows or [1, n] of columns."""
        return self.top + self.total.log()

    def mean(self) -> Float[Tensor, "..."]:
        """Means under the softmax, shaped like lse()."""
        return self.sums / self.total


def log_sums(logits: Logits, size: int) -> tuple[Float[Tensor, "n 1"], Float[Tensor, "1 n"]]:
    """Log-sum-exps of all rows and of all columns in one sweep."""
    rows, columns = Stream(logits, 1), Stream(logits, 0)
    for i, j in tiles(logits, size):
        tile = logits.tile(i, j)
        rows.add(i, tile)
        columns.add(j, tile)
    return rows.lse(), columns.lse()
