"""The order of rows: which rows make up the global batch of each step."""

import numpy as np

from teachercache.core.errors import UserError

WINDOW_BLOCKS = 64  # blocks whose rows are mixed; a mapped cache of up to 64 blocks is shuffled as a whole


def epoch_order(
    rows: np.ndarray, *, seed: int, epoch: int, block_rows: int, window: int = WINDOW_BLOCKS
) -> np.ndarray:
    """Rows in this epoch's order: blocks shuffled, then rows shuffled within windows of `window` blocks.

    Reading stays within a window of files, so a cache larger than memory is read at disk speed; blocks mix freely.
    """
    random = np.random.default_rng([seed, epoch])
    rows = rows[
        random.permutation(len(rows))
    ]  # first: up to `window` blocks it alone decides, whatever their size
    group = (
        random.permutation(int(rows.max()) // block_rows + 1) // window
    )  # of a block, by its place in this epoch
    return rows[np.argsort(group.astype(np.int32)[rows // block_rows], kind="stable")]


class Order:
    """Rows of the global batch of each step, the last incomplete batch of an epoch dropped."""

    def __init__(self, rows: np.ndarray, *, batch: int, seed: int, block_rows: int):
        self.rows, self.batch, self.seed, self.block_rows = rows, batch, seed, block_rows
        self.per_epoch = len(rows) // batch
        if not self.per_epoch:
            raise UserError(f"{len(rows)} usable training rows are fewer than --batch-size {batch}")
        self.last = (-1, rows)  # the epoch that was shuffled last

    def rows_of(self, step: int) -> np.ndarray:
        """Manifest rows of a step."""
        epoch, place = divmod(step, self.per_epoch)
        if self.last[0] != epoch:
            self.last = (
                epoch,
                epoch_order(self.rows, seed=self.seed, epoch=epoch, block_rows=self.block_rows),
            )
        return self.last[1][place * self.batch : (place + 1) * self.batch]

    def share_of(self, item: int | tuple[int, int, int], rank: int, world: int) -> tuple[int, np.ndarray]:
        """Epoch and this rank's rows of a step, or of (step, first, last) those of its rows alone, a micro-batch."""
        share = self.batch // world
        step, first, last = item if isinstance(item, tuple) else (item, 0, share)
        return step // self.per_epoch, self.rows_of(step)[rank * share : (rank + 1) * share][first:last]
