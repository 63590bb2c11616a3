"""Compute the logits of N pairs tile by tile, with streaming log-sum-exps over rows and columns.

The losses themselves are in `tiled`. To split the rows over ranks, each rank would loop over the tiles of its
own rows: its row streams are then complete, and its column streams have to be merged over ranks before
`lse()`.
"""

import dataclasses
from collections.abc import Iterator

import torch
from jaxtyping import Float
from torch import Tensor

# On a CPU, 512 and 1024 are equally fast and 2048 takes 1.1 times as long. Every operation on a tile
# synchronizes all threads, so where other processes share the cores, 1024 is much faster than 512 because it
# needs a quarter of the operations. The value for CUDA is a guess: a tile takes 64 MiB in float32.
TILE = {"cpu": 1024, "cuda": 4096}


def tile_size(rows: Float[Tensor, "n d"]) -> int:
    """Return the rows (and columns) of a tile on the device of `rows`."""
    return TILE.get(rows.device.type, TILE["cuda"])


@dataclasses.dataclass(frozen=True)
class Logits:
    """Z = a X Y^T, computed tile by tile and never stored as a whole."""

    X: Float[Tensor, "n d"]
    Y: Float[Tensor, "n d"]
    a: Float[Tensor, ""]

    def tile(self, i: slice, j: slice) -> Float[Tensor, "i j"]:
        """Compute rows i and columns j of Z."""
        return (self.a * self.X[i]) @ self.Y[j].T


def cut(count: int, size: int) -> list[slice]:
    """Split range(count) into slices of `size`; the last slice may be smaller."""
    return [slice(start, min(start + size, count)) for start in range(0, count, size)]


def tiles(logits: Logits, size: int) -> Iterator[tuple[slice, slice]]:
    """Iterate over square tiles (row slice, column slice), row by row; tiles on the diagonal have i == j."""
    slices = cut(len(logits.X), size)
    return ((i, j) for i in slices for j in slices)


class Stream:
    """Streaming log-sum-exp over one dimension of tiled logits, and means of values under their softmax.

    Args:
        logits: The logits [n, n] whose tiles will be added; they give the size, dtype and device.
        dim: 1 to reduce over the columns (one result per row), 0 to reduce over the rows.
    """

    def __init__(self, logits: Logits, dim: int) -> None:
        shape = (len(logits.X), 1) if dim else (1, len(logits.X))
        self.dim = dim
        self.top = logits.X.new_full(shape, -torch.inf)
        self.total, self.sums = logits.X.new_zeros(shape), logits.X.new_zeros(shape)

    def add(
        self, block: slice, tile: Float[Tensor, "i j"], values: Float[Tensor, "i j"] | None = None
    ) -> None:
        """Add a tile.

        Args:
            block: The rows of the tile (dim 1) or its columns (dim 0).
            tile: The logits of the tile.
            values: Values to average under the softmax; they are overwritten.
        """
        start, count = block.start, block.stop - block.start
        top, total, sums = (
            buffer.narrow(1 - self.dim, start, count) for buffer in (self.top, self.total, self.sums)
        )
        higher = torch.maximum(top, tile.amax(self.dim, keepdim=True))
        shrink = (top - higher).exp_()
        weights = (tile - higher).exp_()
        total.mul_(shrink).add_(weights.sum(self.dim, keepdim=True))
        if values is not None:
            sums.mul_(shrink).add_(values.mul_(weights).sum(self.dim, keepdim=True))
        top.copy_(higher)

    def lse(self) -> Float[Tensor, "..."]:
        """Return the log-sum-exps, [n, 1] for rows or [1, n] for columns."""
        return self.top + self.total.log()

    def mean(self) -> Float[Tensor, "..."]:
        """Return the means under the softmax, with the shape of `lse()`."""
        return self.sums / self.total


def log_sums(logits: Logits, size: int) -> tuple[Float[Tensor, "n 1"], Float[Tensor, "1 n"]]:
    """Compute the log-sum-exps of all rows and of all columns in one sweep."""
    rows, columns = Stream(logits, 1), Stream(logits, 0)
    for i, j in tiles(logits, size):
        tile = logits.tile(i, j)
        rows.add(i, tile)
        columns.add(j, tile)
    return rows.lse(), columns.lse()
