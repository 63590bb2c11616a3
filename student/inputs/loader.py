"""Batches decoded ahead by worker processes."""

from typing import Protocol, cast

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from student.inputs.order import MicroBatch, StepPlan
from teachercache.data.manifest import Manifest


class Batches(Protocol):
    """What training asks of the batches of any kind of rows."""

    manifest: Manifest
    rows: np.ndarray  # training rows, places in the manifest
    plan: StepPlan
    num_views: int  # stored augmented views per picture, 0 for plain pictures

    def __len__(self) -> int:
        """Return the number of steps."""

    def __getitem__(self, item: int | MicroBatch) -> dict[str, Tensor]:
        """Return this rank's rows of a step, or of a micro-batch of it."""


def loader(batches: Batches, *, start: int, workers: int, micro: int = 0) -> DataLoader[dict[str, Tensor]]:
    """Return batches from step `start` on, or their micro-batches of `micro` rows, decoded by `workers` processes."""
    size = micro or batches.plan.share
    cuts = range(0, batches.plan.share, size)
    return DataLoader(
        cast(Dataset[dict[str, Tensor]], batches),
        batch_size=None,
        sampler=(MicroBatch(step, cut, cut + size) for step in range(start, len(batches)) for cut in cuts),
        num_workers=workers,
        generator=torch.Generator(),  # its own: a resumed run must not draw from the global one at another time
        prefetch_factor=4 if workers else None,
    )
