"""Load batches ahead of time in worker processes."""

from collections.abc import Iterator
from typing import Protocol, cast

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from student.inputs.order import MicroBatch, StepPlan
from teachercache.data.manifest import Manifest
from teachercache.data.workers import hand_over, limited, received, start_method


class Batches(Protocol):
    """Members that training uses of the batches of any kind of rows."""

    manifest: Manifest
    rows: np.ndarray  # indices of the training rows in the manifest
    plan: StepPlan
    num_views: int  # stored augmented views per picture; 0 for unaugmented pictures

    def __len__(self) -> int:
        """Return the number of steps."""

    def __getitem__(self, item: int | MicroBatch) -> dict[str, Tensor]:
        """Return the batch of this rank in a step, or one micro-batch of it."""


def loader(batches: Batches, *, start: int, workers: int, micro: int = 0) -> Iterator[dict[str, Tensor]]:
    """Yield the batches from step `start` on.

    Args:
        batches: The batches of a run.
        start: First step.
        workers: Number of decoding processes; 0 decodes in this process.
        micro: Rows of a micro-batch; 0 for whole batches.

    Raises:
        MachineError: A decoding process died, or the machine failed in one.
        UserError: A row cannot be read.
    """
    size, workers = micro or batches.plan.share, limited(workers)
    cuts = range(0, batches.plan.share, size)
    data = DataLoader(
        cast(Dataset[dict[str, Tensor]], batches),
        batch_size=None,
        sampler=(MicroBatch(step, cut, cut + size) for step in range(start, len(batches)) for cut in cuts),
        num_workers=workers,
        multiprocessing_context=start_method(workers),
        collate_fn=hand_over(workers),
        # A generator of its own, so that a resumed run draws the same numbers from the global one
        generator=torch.Generator(),
        prefetch_factor=4 if workers else None,
    )
    yield from received(data)
