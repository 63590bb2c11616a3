"""The order of training rows: the rows in the global batch of each step, and the share of each rank."""

import dataclasses
from typing import NamedTuple

import numpy as np

from student.streams import stream
from teachercache.core.errors import UserError

WINDOW_BLOCKS = 64  # blocks whose rows are shuffled together


class MicroBatch(NamedTuple):
    """Rows `first` to `last` (exclusive) of one rank's share of a step."""

    step: int
    first: int
    last: int


@dataclasses.dataclass(frozen=True)
class StepPlan:
    """Sizes of a run: its steps, their batches, and the ranks that share a batch.

    Args:
        batch: Rows per step, over all ranks.
        steps: Number of steps.
        seed: Seed of all random draws.
        rank: Index of this process.
        world: Number of processes.
    """

    batch: int
    steps: int
    seed: int
    rank: int = 0
    world: int = 1

    @property
    def share(self) -> int:
        """Rows per step and rank."""
        return self.batch // self.world

    def cut(self, item: int | MicroBatch) -> tuple[int, slice]:
        """Return the step of a batch or micro-batch, and the slice of its rows in the global batch."""
        step, first, last = item if isinstance(item, tuple) else (item, 0, self.share)
        start = self.rank * self.share
        return step, slice(start + first, start + min(last, self.share))


def epoch_order(
    rows: np.ndarray,
    *,
    seed: int,
    epoch: int,
    block_rows: int,
    window: int = WINDOW_BLOCKS,
    draws: str = "row_order",
) -> np.ndarray:
    """Return the rows in the order of an epoch: shuffle the blocks, then the rows within windows of blocks.

    Reads stay within one window of files, so that a cache larger than memory is read at disk speed. A cache
    of at most `window` blocks is shuffled completely.

    Args:
        rows: Indices of the training rows.
        seed: Seed of the run.
        epoch: Index of the epoch.
        block_rows: Rows of a cache block.
        window: Blocks per window.
        draws: Name of the random stream.
    """
    random = stream(draws, seed, epoch)
    rows = rows[random.permutation(len(rows))]
    window_of_block = random.permutation(int(rows.max()) // block_rows + 1) // window
    return rows[np.argsort(window_of_block.astype(np.int32)[rows // block_rows], kind="stable")]


class Order:
    """The rows of each step's global batch. An incomplete batch at the end of an epoch is dropped.

    Args:
        rows: Indices of the training rows.
        batch: Rows per step, over all ranks.
        seed: Seed of the run.
        block_rows: Rows of a cache block.
        draws: Name of the random stream.
    """

    def __init__(self, rows: np.ndarray, *, batch: int, seed: int, block_rows: int, draws: str = "row_order"):
        self.rows, self.batch, self.seed, self.block_rows = rows, batch, seed, block_rows
        self.draws = draws
        self.per_epoch = len(rows) // batch
        if not self.per_epoch:
            raise UserError(f"{len(rows)} usable training rows are fewer than --batch-size {batch}")
        self.shuffled = (-1, rows)  # the epoch shuffled last, and its rows in order

    def epoch_of(self, step: int) -> int:
        """Return the index of a step's epoch."""
        return step // self.per_epoch

    def rows_of(self, step: int) -> np.ndarray:
        """Return the rows of a step's global batch, as indices of the manifest."""
        epoch, index = divmod(step, self.per_epoch)
        if self.shuffled[0] != epoch:
            rows = epoch_order(
                self.rows, seed=self.seed, epoch=epoch, block_rows=self.block_rows, draws=self.draws
            )
            self.shuffled = (epoch, rows)
        return self.shuffled[1][index * self.batch : (index + 1) * self.batch]
