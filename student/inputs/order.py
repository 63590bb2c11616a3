"""The order of rows: which rows make up the global batch of each step, and which of them a rank computes."""

import dataclasses
from typing import NamedTuple

import numpy as np

from student.streams import stream
from teachercache.core.errors import UserError

WINDOW_BLOCKS = 64  # blocks whose rows are mixed; a mapped cache of up to 64 blocks is shuffled as a whole


class MicroBatch(NamedTuple):
    """Rows `first` to `last` of one rank's share of a step."""

    step: int
    first: int
    last: int


@dataclasses.dataclass(frozen=True)
class StepPlan:
    """How a run is cut into steps, and the steps into ranks.

    Args:
        batch: Rows per step, over all ranks.
        steps: Steps of the run.
        seed: Seed of every random draw.
        rank: This process.
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
        """Return the step of a batch or micro-batch, and where its rows lie in the global batch."""
        step, first, last = item if isinstance(item, tuple) else (item, 0, self.share)
        start = self.rank * self.share
        return step, slice(start + first, start + min(last, self.share))


def epoch_order(
    rows: np.ndarray, *, seed: int, epoch: int, block_rows: int, window: int = WINDOW_BLOCKS
) -> np.ndarray:
    """Return the rows in the order of an epoch: blocks shuffled, then rows shuffled within windows of blocks.

    Reads stay within a window of files, so a cache larger than memory is read at disk speed. A cache of up to
    `window` blocks is shuffled as a whole, whatever the size of its blocks.
    """
    random = stream("row_order", seed, epoch)
    rows = rows[random.permutation(len(rows))]
    window_of_block = random.permutation(int(rows.max()) // block_rows + 1) // window
    return rows[np.argsort(window_of_block.astype(np.int32)[rows // block_rows], kind="stable")]


class Order:
    """Rows of the global batch of each step; the last incomplete batch of an epoch is dropped."""

    def __init__(self, rows: np.ndarray, *, batch: int, seed: int, block_rows: int):
        self.rows, self.batch, self.seed, self.block_rows = rows, batch, seed, block_rows
        self.per_epoch = len(rows) // batch
        if not self.per_epoch:
            raise UserError(f"{len(rows)} usable training rows are fewer than --batch-size {batch}")
        self.shuffled = (-1, rows)  # the epoch that was shuffled last, and its rows

    def epoch_of(self, step: int) -> int:
        """Return the epoch of a step."""
        return step // self.per_epoch

    def rows_of(self, step: int) -> np.ndarray:
        """Return the manifest rows of a step's global batch."""
        epoch, place = divmod(step, self.per_epoch)
        if self.shuffled[0] != epoch:
            rows = epoch_order(self.rows, seed=self.seed, epoch=epoch, block_rows=self.block_rows)
            self.shuffled = (epoch, rows)
        return self.shuffled[1][place * self.batch : (place + 1) * self.batch]
